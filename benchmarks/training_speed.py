"""python -m benchmarks.training_speed --rounds 5 --steps 8

How long training takes: the published article's loop, written plainly, against StagedTrainer. The
sides take turns stage by stage, each in a process of its own, on a random CLIP of ViT-B/32 size and
drawn images; the article's whole schedule is projected. Alike for both: images are decoded from
what data_prep stores (the article's own, of a megapixel and more, would take longer), augmented by
`nicheclip.training.data.augment`, in the main process; evaluation and checkpoints are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from data_prep.verify import JPEG_QUALITY
from domains.facades.painter import STYLES, draw
from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import format_table
from nicheclip.files import quiet_datasets, write_json
from nicheclip.images import encode_jpeg
from nicheclip.processes import keep_freed_memory
from nicheclip.run import features
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.contrastive import ContrastiveTrainer
from nicheclip.training.data import TrainingSamples, Views, augment
from nicheclip.training.feature_cache import encode_views
from nicheclip.training.stages import set_trainable, trainable_names
from nicheclip.training.towers import PIXELS, cut_before
from nicheclip.training.trainer import StagedTrainer

DOMAINS = Path(__file__).parents[1] / "domains"
ARTICLE = DOMAINS / "architecture" / "article.yaml"
ARTICLE_BATCH = 16
VISITS, IMAGES = 7018, 4060  # samples an epoch of the article, of so many images
WARM_UP = 6  # steps: until no new memory is asked for
DRAWN = 64  # images here; two views of each fill a shard of the feature cache
TINY = {"hidden_size": 64, "intermediate_size": 256}
TINY |= {"num_attention_heads": 2, "num_hidden_layers": 3}
SIZES = {  # of the model, and the side of its images
    "vit-b-32": (CLIPConfig(), 224),
    "small": (CLIPConfig(text_config=TINY, vision_config=TINY | {"image_size": 64}), 64),
}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Side:
    """One way to train, in one stage."""

    model: CLIPModel
    batches: Iterator[dict[str, torch.Tensor]]
    train: Callable[[dict[str, torch.Tensor]], object]  # forward and backward
    update: Callable[[], None]
    batch_size: int

    def steps(self, count: int) -> float:
        """Seconds a sample that they take."""
        started = _now()
        for _ in range(count):
            self.train(next(self.batches))
            self.update()
        return (_now() - started) / (count * self.batch_size)


@dataclass
class Setting:
    """What all sides share."""

    domain: Domain
    rows: datasets.Dataset
    model: CLIPModel
    processor: CLIPProcessor
    folder: Path
    args: argparse.Namespace

    def samples(self, seed: int) -> TrainingSamples:
        """What our side trains on."""
        prompts, augmentation = self.domain.prompt_bank[1], self.domain.augmentation
        return TrainingSamples(self.rows, prompts, augmentation, self.processor, seed)


class Samples(torch.utils.data.Dataset):
    """Pixels and prompt of a sample, as a plain loop makes them; prompts of 77 tokens."""

    def __init__(self, setting: Setting):
        self.rows, self.domain, self.processor = setting.rows, setting.domain, setting.processor
        self.side = SIZES[setting.args.size][1]
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        row = self.rows[index]
        view = augment(row["image"].convert("RGB"), self.side, self.domain.augmentation, self.rng)
        prompts = self.domain.classes[self.domain.class_names[row["label"]]]
        pixels = self.processor.image_processor(view, return_tensors="pt")["pixel_values"][0]
        return pixels, self.rng.choice(prompts)

    def collate(self, samples: list[tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
        """A batch of them."""
        pixels, prompts = zip(*samples, strict=True)
        options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        tokens = self.processor.tokenizer(list(prompts), **options)
        return {**tokens, "pixel_values": torch.stack(pixels)}


def article(setting: Setting) -> Iterator[Side]:
    """The article's loop: float32, 77 places a prompt, every image from its pixels each time."""
    model, samples = deepcopy(setting.model).train(), Samples(setting)
    sampler = RandomSampler(samples, replacement=True, num_samples=VISITS)
    loader = DataLoader(
        samples, ARTICLE_BATCH, sampler=sampler, drop_last=True, collate_fn=samples.collate
    )
    for stage in setting.domain.stages:
        set_trainable(model, stage)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, stage.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
        )

        def train(batch: dict[str, torch.Tensor]) -> None:
            inputs = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
            logits = model(**inputs).logits_per_image  # (B, B)
            own = torch.arange(len(logits), device=DEVICE)
            both = [cross_entropy(each, own, label_smoothing=0.1) for each in (logits, logits.T)]
            (sum(both) / 2).backward()

        def update(optimizer=optimizer, trained=trained) -> None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        yield Side(model, chain.from_iterable(repeat(loader)), train, update, ARTICLE_BATCH)


def ours(setting: Setting) -> Iterator[Side]:
    """StagedTrainer, by its own methods."""
    domain, processor, args = setting.domain, setting.processor, setting.args
    options = domain.training | {"output_dir": str(setting.folder / "ours")}
    options |= {"cached_views": args.views, "bf16": args.precision == "bf16"}
    options["per_device_train_batch_size"] = args.batch_size
    validation = Views(setting.rows.select(range(8)), processor)
    training_args, model = StagedTrainingArguments(**options), deepcopy(setting.model)
    trainer = StagedTrainer(model, training_args, domain, processor, setting.samples(0), validation)
    for stage, folder in zip(domain.stages, trainer.folders, strict=True):
        of_stage = trainer.begin_stage(stage, folder)
        yield _of_trainer(of_stage, stage.epochs * trainer.steps_per_epoch)
        of_stage.model.store()


def _of_trainer(trainer: ContrastiveTrainer, max_steps: int) -> Side:
    model, loader = trainer._prepare_for_training(max_steps, trainer.get_train_dataloader(), None)
    trainer.current_gradient_accumulation_steps = 1

    def update() -> None:
        trainer._get_grad_norm(model, trainer._clip_grad_norm(model))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()

    def train(batch: dict[str, torch.Tensor]) -> None:
        trainer.training_step(model, batch)

    size = trainer.args.train_batch_size
    return Side(trainer.model.clip, chain.from_iterable(repeat(loader)), train, update, size)


SIDES = {"article": article, "ours": ours}


def main() -> None:
    """The command line."""
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--size", choices=SIZES, default="vit-b-32")
    parser.add_argument("--batch-size", type=int, default=16, help="ours; the article's is 16")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32", help="ours")
    parser.add_argument("--views", type=int, default=4, help="kept of each image; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of each side in a round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training_speed.json"))
    args = parser.parse_args()
    found = measure(args)
    write_json(args.out, found | {"settings": {n: str(v) for n, v in vars(args).items()}})
    print(report(found))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn, stage by stage."""
    sides = {name: Worker(name, args) for name in SIDES}
    stages, peaks = [], {}
    schedule = Domain.load(ARTICLE).stages
    for stage in schedule:
        for name, side in sides.items():
            side("steps", WARM_UP)
            peaks[name] = side("peak")
        rounds = [
            {name: side("steps", args.steps) for name, side in sides.items()}
            for _ in range(args.rounds)
        ]
        taken = {name: [each[name] for each in rounds] for name in sides}
        stages.append({"stage": stage.name, "samples": stage.epochs * VISITS, "seconds": taken})
        if stage is schedule[-1]:
            count = args.rounds if args.views else 0
            encoding = [sides["ours"]("encoding", seed) for seed in range(count)] or [0.0]
        for side in sides.values():
            side("next stage")  # after the last they end
    hours = {
        name: sum(each["samples"] * np.median(each["seconds"][name]) for each in stages) / 3600
        for name in sides
    }
    hours["ours"] += IMAGES * args.views * float(np.median(encoding)) / 3600
    return {
        "stages": stages,
        "seconds_per_view": encoding,
        "hours": {name: float(value) for name, value in hours.items()},
        "peak_mb": peaks,
        "threads": torch.get_num_threads(),
        "device": DEVICE.type,
    }


def report(found: dict[str, Any]) -> str:
    """A table of milliseconds a sample, and the article's whole schedule projected."""
    rows = []
    for stage in found["stages"]:
        article, ours = (np.array(stage["seconds"][name]) for name in SIDES)
        ratios = np.sort(article / ours)
        ratio = f"{np.median(ratios):.1f}x [{ratios[0]:.1f}, {ratios[-1]:.1f}]"
        milliseconds = [f"{1000 * np.median(side):.1f}" for side in (article, ours)]
        rows.append([stage["stage"], *milliseconds, ratio])
    hours, peaks = found["hours"], found["peak_mb"]
    view = 1000 * float(np.median(found["seconds_per_view"]))
    return (
        format_table(["stage", "article, ms", "ours, ms", "ratio [lowest, highest]"], rows)
        + f"\nencoding a view: {view:.1f} ms. The article's schedule, encoding included: "
        f"{hours['article']:.2f} h and {hours['ours']:.2f} h, "
        f"{hours['article'] / hours['ours']:.1f}x; peak memory {peaks['article']:.0f} and "
        f"{peaks['ours']:.0f} MB"
    )


class Worker:
    """A side in a process of its own, which rests but when it is asked."""

    def __init__(self, name: str, args: argparse.Namespace):
        self._pipe, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        spawn.Process(target=_work, args=(name, args, theirs), daemon=True).start()
        theirs.close()

    def __call__(self, question: str, *arguments: Any) -> Any:
        """What the process answers."""
        self._pipe.send((question, *arguments))
        return self._pipe.recv()


def _work(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    if name == "ours":
        keep_freed_memory()  # as train.py does
    with tempfile.TemporaryDirectory() as folder, quiet_datasets():
        setting = _setting(args, Path(folder))
        for side in SIDES[name](setting):
            answers = {"steps": side.steps, "peak": _peak_memory}
            answers["encoding"] = partial(_encoding, setting, side.model)
            for question, *arguments in iter(pipe.recv, ("next stage",)):
                pipe.send(answers[question](*arguments))
            pipe.send(None)


def _setting(args: argparse.Namespace, folder: Path) -> Setting:
    torch.manual_seed(0)
    domain = Domain.load(ARTICLE)
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
    return Setting(domain, _rows(domain), CLIPModel(config).to(DEVICE), processor, folder, args)


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


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _encoding(setting: Setting, model: CLIPModel, seed: int) -> float:
    """Seconds a view to build the features of all stages, at the cuts that StagedTrainer keeps."""
    names = [name for name, _ in model.named_parameters()]
    trained = [trainable_names(names, stage) for stage in setting.domain.stages]
    cuts = sorted({cut_before(model.vision_model, of_stage) for of_stage in trained} - {PIXELS})
    samples, cache = setting.samples(seed), setting.folder / f"round-{seed}"
    autocast, started = AUTOCAST[setting.args.precision], _now()
    encode_views(model.vision_model, samples, 2, cuts, cache, autocast)
    return (_now() - started) / (2 * len(setting.rows))


def _peak_memory() -> float:
    """Of this process in MB: the GPU's memory if there is one, else all that lies in RAM."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
