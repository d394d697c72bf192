"""python -m benchmarks.training_speed [--precision bf16] [--batch-size 16] [--views 4]

Seconds a training sample: the article's loop, as it is described, against ours, in turn in one process and by stage;
and what its whole schedule (15 epochs of 7,018 visits of 4,060 images) would take of each, the encoding of the views
included. Random weights of ViT-B/32 size.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.utils import logging

from data_prep.sources.painter import STYLES, draw
from model_card.figures import BASE, INK, STYLE, TUNED
from nicheclip.data import TrainingVisits, Views, augment, features, quiet_datasets
from nicheclip.domain import Domain, Stage
from nicheclip.feature_cache import encode_views
from nicheclip.losses import info_nce
from nicheclip.results import format_table, write_json
from nicheclip.stages import set_trainable
from nicheclip.towers import begin_later
from nicheclip.trainer import StagedTrainer
from nicheclip.training_args import StagedTrainingArguments

IMAGES, VISITS = 4060, 7018  # the article's: distinct training images, visits an epoch
STORED_SIDE = 288  # shorter side of what data_prep keeps; the article's loop decodes ORIGINAL_SIDE
ORIGINAL_SIDE = 640
SIZES = {
    "vit-b-32": CLIPConfig(),
    "small": CLIPConfig(
        text_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
        vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
}
Step = Callable[[], float]  # seconds of one step


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.memory_of:
        steps = SIDES[args.memory_of](args, *world(args))
        for step in steps:
            step(), step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)
        return
    domain, rows = world(args)
    times: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    steps = {side: make(args, domain, rows) for side, make in SIDES.items()}
    for round_number in range(args.rounds + 1):
        for side, of_stage in steps.items():
            taken = [np.mean([step() for _ in range(args.steps)]) / args.batch_size for step in of_stage]
            if round_number:  # the first one warms up
                times[side].append(taken)
    encoding = seconds_a_view(args, domain, rows) if args.views else 0.0
    report(args, domain, {side: np.array(taken) for side, taken in times.items()}, encoding)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="vit-b-32")
    parser.add_argument("--batch-size", type=int, default=16, help="of ours; the article's loop has 16")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of ours")
    parser.add_argument("--views", type=int, default=4, help="of each image; 0: no cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each side, stage and round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training_speed.json"))
    parser.add_argument("--memory-of", choices=["article", "ours"], help="print the peak memory of one side, in GiB")
    return parser.parse_args()


def world(args: argparse.Namespace) -> tuple[Domain, datasets.Dataset]:
    """The architecture domain with the article's stages, and drawn pictures in place of its photos."""
    domain = Domain.load("domains/architecture/article.yaml")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(max(64, 4 * args.batch_size)):
        picture = draw(list(STYLES)[index % len(STYLES)], rng).resize((ORIGINAL_SIDE, ORIGINAL_SIDE))
        row = dict.fromkeys(features(domain.class_names), "")
        image = {"bytes": _jpeg(picture), "path": None}
        label = index % len(domain.classes)
        rows.append(row | {"image": image, "label": label, "sha256": f"{index:x}", "zero_shot_score": 0, "repeats": 2})
    return domain, datasets.Dataset.from_list(rows, features=features(domain.class_names))


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _model_and_processor(args: argparse.Namespace, domain: Domain) -> tuple[CLIPModel, CLIPProcessor]:
    """Prompts get about as many tokens as from CLIP's own vocabulary: 12 in the median."""
    torch.manual_seed(0)
    model = CLIPModel(SIZES[args.size]).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = CLIPTokenizer.from_pretrained("domains/facades/base")
    tokenizer = tokenizer.train_new_from_iterator([domain.prompt_bank[0]], vocab_size=1800)
    model.config.text_config.eos_token_id = model.text_model.eos_token_id = tokenizer.eos_token_id
    return model, CLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer)


def article_steps(args: argparse.Namespace, domain: Domain, rows: datasets.Dataset) -> list[Step]:
    """A step of each stage: decode the photo, augment it, both towers over 16 images and 16 prompts of 77 tokens."""
    model, processor = _model_and_processor(args, domain)
    prompts, classes = domain.prompt_bank
    rng = np.random.default_rng(0)

    def step_of(stage: Stage) -> Step:
        set_trainable(model, stage)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=stage.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)

        def step() -> float:
            set_trainable(model, stage)
            started = _now()
            batch = [rows[int(index)] for index in rng.integers(len(rows), size=16)]
            views = [augment(row["image"].convert("RGB"), 224, domain.augmentation, rng) for row in batch]
            pixels = processor.image_processor(views, do_resize=False, do_center_crop=False, return_tensors="pt")
            own = [prompts[rng.choice(np.flatnonzero(np.equal(classes, row["label"])))] for row in batch]
            tokens = processor.tokenizer(
                own, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            )
            outputs = model(**{name: tensor.to(model.device) for name, tensor in {**pixels, **tokens}.items()})
            loss = info_nce(outputs.logits_per_image, torch.arange(16), 0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return (_now() - started) * args.batch_size / 16

        return step

    return [step_of(stage) for stage in domain.stages]


def our_steps(args: argparse.Namespace, domain: Domain, rows: datasets.Dataset) -> list[Step]:
    """A step of each stage with the trainer's own loader, loss, backward pass and optimiser."""

    def step_of(stage: Stage) -> Step:
        trainer = _trainer(args, domain, rows)
        trainer._enter(stage, 0, None)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        model.train()

        def batches() -> Iterator[dict[str, torch.Tensor]]:
            while True:
                yield from trainer.get_train_dataloader()

        coming = batches()

        def step() -> float:
            started = _now()
            trainer.training_step(model, next(coming))
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
            return _now() - started

        return step

    return [step_of(stage) for stage in domain.stages]


SIDES = {"article": article_steps, "ours": our_steps}


def _trainer(args: argparse.Namespace, domain: Domain, rows: datasets.Dataset) -> StagedTrainer:
    model, processor = _model_and_processor(args, domain)
    folder = tempfile.mkdtemp(prefix="training_speed_")
    options = StagedTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        cached_views=args.views,
        bf16=args.precision == "bf16",
        disable_tqdm=True,
        loss="info_nce",
    )
    visits = TrainingVisits(_stored(rows), domain.prompt_bank[1], domain.augmentation, processor, 0)
    return StagedTrainer(model, options, domain, processor, visits, Views(_stored(rows.select(range(8))), processor))


def _stored(rows: datasets.Dataset) -> datasets.Dataset:
    """As data_prep keeps pictures."""
    small = [
        row | {"image": {"bytes": _jpeg(row["image"].resize((STORED_SIDE, STORED_SIDE))), "path": None}}
        for row in rows
    ]
    return datasets.Dataset.from_list(small, features=rows.features)


def seconds_a_view(args: argparse.Namespace, domain: Domain, rows: datasets.Dataset) -> float:
    """Of encoding for both stages, cuts as in the article's stages."""
    model, processor = _model_and_processor(args, domain)
    begin_later(model)
    trainer = _trainer(args, domain, rows)
    visits = TrainingVisits(_stored(rows), domain.prompt_bank[1], domain.augmentation, processor, 1)
    precision = torch.bfloat16 if args.precision == "bf16" else torch.float32
    taken = []
    for count in (1, 3):
        with tempfile.TemporaryDirectory() as folder:
            started = _now()
            encode_views(
                model.vision_model.eval(),
                visits,
                count,
                sorted(set(trainer._cuts)),
                Path(folder),
                "float16",
                precision,
            )
            taken.append(_now() - started)
    return (taken[1] - taken[0]) / (2 * len(rows))  # without what is done once


def flops(args: argparse.Namespace, domain: Domain, rows: datasets.Dataset) -> dict[str, list[float]]:
    """Multiplications and additions a sample, of each side and stage."""
    counted: dict[str, list[float]] = {}
    for side, make in SIDES.items():
        counted[side] = []
        for step in make(args, domain, rows):
            with FlopCounterMode(display=False) as counter:
                step()
            counted[side].append(counter.get_total_flops() / (16 if side == "article" else args.batch_size))
    return counted


def peak_rate(precision: str) -> float:
    """Operations a second of a large matrix product: what the machine can do at best."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.randn(2048, 2048, device="cuda" if torch.cuda.is_available() else "cpu").to(dtype)
    taken = []
    for _ in range(6):
        started = _now()
        matrix @ matrix
        taken.append(_now() - started)
    return 2 * 2048**3 / min(taken[1:])


def report(args: argparse.Namespace, domain: Domain, times: dict[str, np.ndarray], encoding: float) -> None:
    epochs = np.array([stage.epochs for stage in domain.stages])
    counted = flops(args, *world(args))
    rate = peak_rate(args.precision)
    article, ours = times["article"], times["ours"]  # (rounds, stages), seconds a sample
    rows, result = [], {"settings": {key: str(value) for key, value in vars(args).items()}, "stages": {}}
    for index, stage in enumerate(domain.stages):
        ratios = article[:, index] / ours[:, index]
        a, b = np.median(article[:, index]), np.median(ours[:, index])
        bound = counted["ours"][index] / rate
        rows.append(
            [stage.name, f"{1000 * a:.1f}", f"{1000 * b:.1f}", f"{np.median(ratios):.1f}", f"{1000 * bound:.1f}"]
        )
        result["stages"][stage.name] = {
            "article_seconds": a, "seconds": b, "ratio": np.median(ratios), "ratios": ratios.tolist(),
            "article_flops": counted["article"][index], "flops": counted["ours"][index], "bound_seconds": bound,
        }  # fmt: skip
    hours = {side: VISITS * (taken @ epochs) / 3600 for side, taken in times.items()}
    build = IMAGES * args.views * encoding / 3600
    ratio = hours["article"] / (hours["ours"] + build)
    threads = torch.get_num_threads()
    title = f"{args.size}, {args.precision}, batch {args.batch_size}, {args.views} views, {threads} threads"
    print(title)
    print(format_table(["stage", "article ms", "ours ms", "ratio", "arithmetic alone ms"], rows))
    memory = {side: _memory(args, side) for side in SIDES}
    whole = {
        "article_hours": float(np.median(hours["article"])), "hours": float(np.median(hours["ours"])),
        "encoding_hours": build, "seconds_a_view": encoding, "ratio": float(np.median(ratio)),
        "ratio_low": float(ratio.min()), "ratio_high": float(ratio.max()), "peak_gib": memory, "peak_rate": rate,
    }  # fmt: skip
    print(
        f"whole schedule: {whole['article_hours']:.2f} h, ours {whole['hours'] + build:.2f} h, of which "
        f"{build:.2f} h encode views ({1000 * encoding:.0f} ms each): {whole['ratio']:.1f} times faster "
        f"({whole['ratio_low']:.1f} to {whole['ratio_high']:.1f} in {len(ratio)} rounds); peak memory "
        f"{memory['article']:.1f} and {memory['ours']:.1f} GiB; large products run at {rate / 1e9:.0f} GFLOP/s"
    )
    write_json(args.out, result | {"whole": whole})
    draw_chart(args.out.with_suffix(".png"), title, domain, times, epochs, build)


def _memory(args: argparse.Namespace, side: str) -> float:
    """Peak resident memory of a process of its own, in GiB, after two steps of each stage."""
    options = [
        f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("size", "batch-size", "precision", "views")
    ]
    command = [sys.executable, "-m", "benchmarks.training_speed", "--memory-of", side, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def draw_chart(
    path: Path, title: str, domain: Domain, times: dict[str, np.ndarray], epochs: np.ndarray, build: float
) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.4), layout="constrained")
        axes = figure.subplots()
        for height, (side, colour) in enumerate((("ours", TUNED), ("article", BASE))):
            parts = dict(
                zip([s.name for s in domain.stages], VISITS * np.median(times[side], 0) * epochs / 3600, strict=True)
            )
            parts |= {"encoding": build} if side == "ours" and build else {}
            left = 0.0
            for shade, value in enumerate(parts.values()):
                axes.barh(height, value, left=left, color=colour, alpha=1 - 0.3 * shade, edgecolor="white")
                left += value
            told = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
            axes.annotate(f" {left:.2f} h ({told})", (left, height), va="center", color=INK, annotation_clip=False)
        axes.set_yticks([0, 1], ["ours", "the article's loop"])
        axes.set_xlim(right=1.9 * max(VISITS * np.median(times["article"], 0) @ epochs / 3600, 1e-9))
        axes.set_xlabel("hours for 15 epochs of 7,018 visits")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for ending in (".png", ".svg"):
            figure.savefig(path.with_suffix(ending))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    with quiet_datasets():
        main()
