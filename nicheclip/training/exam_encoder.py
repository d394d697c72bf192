"""What calibrate.py shows the models of a cross-fitted run, encoded once for all of them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from nicheclip.clip import VisualTower, load_clip, pixel_values, prefetched
from nicheclip.domain import Domain
from nicheclip.evaluation.exams import Encoder, Model
from nicheclip.files import read_json
from nicheclip.training.data import Views
from nicheclip.training.feature_cache import AUTOCAST, BATCH, KEPT_AS, encode_views
from nicheclip.training.stages import all_trained
from nicheclip.training.towers import PIXELS, between, cut_before, depth


class ExamEncoder(Encoder):
    """What no stage trains is the base's in all models: its states are shared.

    Those of the images are read from what training has kept, in float16; those of other pictures
    are kept in memory.
    """

    def __init__(self, run: Path, rows: datasets.Dataset, domain: Domain):
        super().__init__(rows)
        remedy = f"run `accelerate launch train.py {run}` first"
        settings = read_json(run / "training.json", remedy, ["settings"])["settings"]
        self.base, self.processor = load_clip(domain.base)
        self.cut = cut_before(self.base.vision_model, all_trained(self.base, domain.stages))
        cuts, cache = [self.cut] if self.cut > PIXELS else [], run / "cache/features/validation"
        views, autocast = Views(rows, self.processor), AUTOCAST[settings["precision"]]
        self.states = encode_views(self.base.vision_model, views, 1, cuts, cache, autocast)
        self.kept: dict[str, list[torch.Tensor]] = {}

    def images(self, model: Model, chosen: np.ndarray, title: str) -> np.ndarray:
        """Pooled features (N, F) of the rows chosen."""
        batches = np.array_split(chosen, max(1, len(chosen) // BATCH))
        begun = (
            torch.stack([self.states(row, 0) for row in batch.tolist()])
            for batch in tqdm(batches, title, unit="batch", leave=False)
        )
        return self._finished(model, begun).cpu().numpy()

    def pictures(
        self, model: Model, pictures: Iterable[Image.Image], total: int, title: str, key: str
    ) -> np.ndarray:
        """As `Encoder.pictures`."""
        if key not in self.kept:
            self.kept[key] = list(self._begun(pictures, total, title))
        with torch.inference_mode():
            return (
                VisualTower(model[0]).project(self._finished(model, self.kept[key])).cpu().numpy()
            )

    @torch.inference_mode()
    def _begun(
        self, pictures: Iterable[Image.Image], total: int, title: str
    ) -> Iterator[torch.Tensor]:
        source = iter(tqdm(pictures, title, total, unit="img", leave=False))
        batches = iter(lambda: list(islice(source, BATCH)), [])
        for pixels in prefetched(pixel_values(self.processor, batch) for batch in batches):
            states = between(self.base.vision_model, pixels.to(self.base.device), PIXELS, self.cut)
            yield torch.from_numpy(states.cpu().numpy().astype(KEPT_AS))

    @torch.inference_mode()
    def _finished(self, model: Model, begun: Iterable[torch.Tensor]) -> torch.Tensor:
        tower, found = model[0].vision_model, []
        for states in begun:
            ended = between(tower, states.to(model[0].device).float(), self.cut, depth(tower))
            found.append(tower.post_layernorm(ended))
        return torch.cat(found)
