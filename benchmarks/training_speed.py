"""python -m benchmarks.training_speed --rounds 5 --steps 8

How long training takes: the published article's loop, written plainly, against StagedTrainer with
the default recipe. The sides take turns, each time in a new process, on a random CLIP of ViT-B/32
size and drawn images; hours are of the whole schedules on the article's images, all variants and
runs of ours included. Alike for both: images are decoded from what data_prep stores (the article's
own, of a megapixel and more, would take longer), augmented by `nicheclip.training.data.augment`, in
the main process; evaluation and checkpoints are left out.
"""

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    TrainerCallback,
    TrainerControl,
)

from data_prep.verify import JPEG_QUALITY
from domains.facades.painter import STYLES, draw
from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import format_table
from nicheclip.files import quiet_datasets, write_json
from nicheclip.images import encode_jpeg
from nicheclip.processes import keep_freed_memory
from nicheclip.recipe import Stage
from nicheclip.run import features
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.data import TrainingSamples, Views, augment
from nicheclip.training.distillation import STEPS_PER_EPOCH
from nicheclip.training.stages import set_trainable
from nicheclip.training.trainer import StagedTrainer

DOMAINS = Path(__file__).parents[1] / "domains"
ARTICLE_BATCH = 16
VISITS, IMAGES = 7018, 4060  # balanced samples an epoch of the article, of so many images
WARM_UP = 6  # steps: until no new memory is asked for
DRAWN = 64  # images here
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
SIZES = {  # of the model, and the side of its images
    "vit-b-32": (CLIPConfig(), 224),
    "small": (CLIPConfig(text_config=TINY, vision_config=TINY | {"image_size": 64}), 64),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Rows = list[dict[str, Any]]  # of each stage: its name, samples, and seconds a sample


@dataclass
class Setting:
    """What a side trains, and on what."""

    domain: Domain
    rows: datasets.Dataset
    model: CLIPModel
    processor: CLIPProcessor
    args: argparse.Namespace


class Clock(TrainerCallback):
    """Takes the time after each step, and saves nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        control.should_save = False
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """What a step takes after the warm-up."""
        return (self.times[-1] - self.times[WARM_UP - 1]) / (len(self.times) - WARM_UP)


def article(setting: Setting) -> Rows:
    """The article's loop: float32, 77 places a prompt, every image from its pixels each time."""
    model, batches, found = setting.model.train(), article_batches(setting), []
    for stage in setting.domain.stages:
        set_trainable(model, stage)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, stage.learning_rate[0], betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
        )
        clock = Clock()
        for _ in range(WARM_UP + setting.args.steps):
            logits = model(**next(batches)).logits_per_image  # (B, B)
            own = torch.arange(len(logits), device=DEVICE)
            both = [cross_entropy(each, own, label_smoothing=0.1) for each in (logits, logits.T)]
            (sum(both) / 2).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.on_step_end(None, None, TrainerControl())
        seconds = clock.seconds() / ARTICLE_BATCH
        found.append({"stage": stage.name, "samples": visits(stage), "seconds": seconds})
    return found


def article_batches(setting: Setting) -> Iterator[dict[str, torch.Tensor]]:
    """Pixels and prompts as a plain loop makes them."""
    domain, processor, rng = setting.domain, setting.processor, np.random.default_rng(0)
    side = SIZES[setting.args.size][1]
    while True:
        views, prompts = [], []
        for index in rng.integers(len(setting.rows), size=ARTICLE_BATCH):
            row = setting.rows[int(index)]
            views.append(augment(row["image"].convert("RGB"), side, domain.augmentation, rng))
            prompts.append(rng.choice(domain.classes[domain.class_names[row["label"]]]))
        options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        yield dict(processor(text=prompts, images=views, **options).to(DEVICE))


def ours(setting: Setting) -> Rows:
    """StagedTrainer, the last variant of each stage; and the encoding of views."""
    keep_freed_memory()  # as train.py does
    domain, processor, args = setting.domain, setting.processor, setting.args
    with tempfile.TemporaryDirectory() as folder:
        options = domain.training | {"output_dir": folder, "cached_views": args.views}
        training_args = StagedTrainingArguments(**options, bf16=args.precision == "bf16")
        drawn = domain.prompt_bank[1], domain.augmentation
        samples = TrainingSamples(setting.rows, *drawn, processor, seed=0)
        validation = Views(setting.rows.select(range(8)), processor)
        of_trainer = domain, processor, samples, validation
        trainer = StagedTrainer(setting.model, training_args, *of_trainer)
        found = []
        for stage in domain.stages:
            towers = trainer.begin_stage(stage)
            run = trainer.trainer_of(stage.variants()[-1], towers, Path(folder) / stage.name)
            batch = next(iter(run.get_train_dataloader()))
            batch_size = len(next(iter(batch.values())))  # samples, or prompts
            clock, run.args.max_steps = Clock(), WARM_UP + args.steps
            run.add_callback(clock)
            run.train()
            towers.store()
            if towers.prototypes is not None:
                trainer.prototypes = towers.prototypes.detach().clone()
            count = visits(stage)
            if stage.loss == "distillation":  # whose samples are prompts
                count = stage.epochs[0] * STEPS_PER_EPOCH * batch_size
            seconds = clock.seconds() / batch_size
            found.append({"stage": stage.name, "samples": count, "seconds": seconds})
        encoded = trainer.record()["features"]
    if args.views:
        seconds = encoded["seconds"] / (encoded["encoded"] + len(validation))
        found.append({"stage": "encoding", "samples": args.views * IMAGES, "seconds": seconds})
    return found


def visits(stage: Stage) -> int:
    """The images that all variants and runs of a stage see."""
    variants = stage.variants(VISITS / IMAGES)
    of_each = [
        variant.epochs[0] * (IMAGES if variant.sampling == ["natural"] else VISITS)
        for variant in variants
    ]
    return sum(of_each) + (stage.runs - 1) * max(of_each)


SIDES = {"article": (article, "article.yaml"), "ours": (ours, "domain.yaml")}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[1])
    parser.add_argument("--size", choices=SIZES, default="vit-b-32")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="ours")
    parser.add_argument("--views", type=int, default=4, help="kept of each image; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of each stage in a round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training_speed.json"))
    args = parser.parse_args()
    found = measure(args)
    write_json(args.out, found | {"settings": {n: str(v) for n, v in vars(args).items()}})
    print(report(found))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn; of each stage the seconds a sample in each round."""
    rows, peaks = [], {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for side in [*SIDES] * args.rounds:
            of_side, peaks[side] = pool.submit(run_side, side, args).result()
            rows += [{"side": side, **row} for row in of_side]
    of_stage = pd.DataFrame(rows).groupby(["side", "stage", "samples"], sort=False)
    stages = of_stage.seconds.agg(list).reset_index()
    stages["hours"] = stages.samples * stages.seconds.map(np.median) / 3600
    return {
        "stages": stages.to_dict("records"),
        "hours": stages.groupby("side").hours.sum().to_dict(),
        "peak_mb": peaks,
        "threads": torch.get_num_threads(),
        "device": DEVICE.type,
    }


def run_side(side: str, args: argparse.Namespace) -> tuple[Rows, float]:
    """One round of a side, and the most memory that it took, in MB: the GPU's, or else in RAM."""
    train, domain_file = SIDES[side]
    with quiet_datasets():
        rows = train(_setting(args, Domain.load(DOMAINS / "architecture" / domain_file)))
    if DEVICE.type == "cuda":
        return rows, torch.cuda.max_memory_allocated() / 2**20
    return rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def report(found: dict[str, Any]) -> str:
    """A table of milliseconds a sample, and the whole schedules projected."""
    rows = []
    for stage in found["stages"]:
        milliseconds = 1000 * np.array(stage["seconds"])
        span = f"{np.median(milliseconds):.1f} [{milliseconds.min():.1f}, {milliseconds.max():.1f}]"
        name, count = f"{stage['side']}, {stage['stage']}", f"{stage['samples']:,}"
        rows.append([name, span, count, f"{stage['hours']:.2f}"])
    hours, peaks = found["hours"], found["peak_mb"]
    table = format_table(["stage", "ms a sample [lowest, highest]", "samples", "hours"], rows)
    return (
        f"{table}\nin all: the article's {hours['article']:.2f} h, ours "
        f"{hours['ours']:.2f} h, {hours['article'] / hours['ours']:.1f}x; peak memory "
        f"{peaks['article']:.0f} and {peaks['ours']:.0f} MB"
    )


def _setting(args: argparse.Namespace, domain: Domain) -> Setting:
    torch.manual_seed(0)
    config, side = SIZES[args.size]
    # Of so many words it needs as many tokens for the domain's prompts as CLIP's own does: 13.3 a
    # prompt, 26 at most.
    tokenizer = CLIPTokenizer.from_pretrained(DOMAINS / "facades" / "base").train_new_from_iterator(
        domain.prompt_bank[0], 1550, show_progress=False
    )
    config.text_config.eos_token_id = tokenizer.eos_token_id
    square = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    return Setting(domain, _rows(domain), CLIPModel(config).to(DEVICE), processor, args)


def _rows(domain: Domain) -> datasets.Dataset:
    """Drawings with the grain of a photo, as data_prep stores them."""
    rng, rows = np.random.default_rng(0), []
    height, width = domain.stored_short_side, domain.stored_short_side * 3 // 2
    unused = dict.fromkeys(("source_id", "group_id", "zero_shot_score", "attribution"))
    for index in range(DRAWN):
        picture = draw(STYLES[index % len(STYLES)], np.random.default_rng(index), height)
        pixels = np.asarray(picture.resize((width, height)))
        grained = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        content = encode_jpeg(Image.fromarray(grained), JPEG_QUALITY)
        row = {"image": {"bytes": content, "path": None}, "label": index % len(domain.classes)}
        row |= {"sha256": hashlib.sha256(content).hexdigest(), "repeats": round(VISITS / DRAWN)}
        rows.append(row | unused)
    return datasets.Dataset.from_list(rows, features=features(domain.class_names))


if __name__ == "__main__":
    main()
