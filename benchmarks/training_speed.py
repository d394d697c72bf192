"""python -m benchmarks.training_speed --rounds 5 --steps 8

How long training takes: the published article's loop, written plainly, against StagedTrainer with
the default recipe. The sides take turns, each time in a new process, on a random CLIP of ViT-B/32
size and drawn images; hours are of the whole schedules on the article's images, all variants and
runs of ours included. Alike for both: images are decoded from what data_prep stores (the article's
own, of a megapixel and more, would take longer), augmented by `nicheclip.training.data.augment`, in
the main process; evaluation and checkpoints are left out.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.trainer_callback import TrainerCallback, TrainerControl

from data_prep.verify import JPEG_QUALITY
from domains.facades.painter import STYLES, draw
from nicheclip.domain import Domain
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
FOLDS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of each stage its name, samples, those of a cross-fitted run, and milliseconds a sample.
Times = Iterator[tuple[str, float, float, float]]


class Clock(TrainerCallback):
    """Takes the time after each step, and saves nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control: TrainerControl, **_) -> None:
        """Called by the Trainer."""
        control.should_save = False
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(1000 * time.perf_counter())

    def milliseconds(self) -> float:
        """What a step takes after the warm-up."""
        return np.diff(self.times[WARM_UP - 1 :]).mean()


def article(args, domain: Domain, rows: Dataset, model: CLIPModel, processor) -> Times:
    """The article's loop: float32, 77 places a prompt, every image from its pixels each time."""
    rng, side = np.random.default_rng(0), SIZES[args.size][1]
    options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    for stage in domain.stages:
        set_trainable(model.train(), stage)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
        optimizer = torch.optim.AdamW(trained, stage.learning_rate[0], **settings)
        clock = Clock()
        for _ in range(WARM_UP + args.steps):
            views, prompts = [], []
            for index in rng.integers(len(rows), size=ARTICLE_BATCH):
                row = rows[int(index)]
                views.append(augment(row["image"].convert("RGB"), side, domain.augmentation, rng))
                prompts.append(rng.choice(domain.classes[domain.class_names[row["label"]]]))
            batch = processor(text=prompts, images=views, **options).to(DEVICE)
            logits = model(**batch).logits_per_image  # (B, B)
            own = torch.arange(len(logits), device=DEVICE)
            both = [cross_entropy(each, own, label_smoothing=0.1) for each in (logits, logits.T)]
            (sum(both) / 2).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.on_step_end(None, None, TrainerControl())
        yield stage.name, visits(stage), visits(stage), clock.milliseconds() / ARTICLE_BATCH


def ours(args, domain: Domain, rows: Dataset, model: CLIPModel, processor) -> Times:
    """StagedTrainer, the last variant of each stage; and the encoding of views."""
    keep_freed_memory()  # as train.py does
    with tempfile.TemporaryDirectory() as folder:
        options = domain.training | {"output_dir": folder, "bf16": args.precision == "bf16"}
        training_args = StagedTrainingArguments(**options)
        samples = TrainingSamples(rows, domain.prompt_bank[1], domain.augmentation, processor, 0)
        validation = Views(rows.select(range(8)), processor)
        trainer = StagedTrainer(model, training_args, domain, processor, samples, validation)
        for stage in domain.stages:
            towers = trainer.begin_stage(stage)
            run = trainer.trainer_of(stage.variants()[-1], towers, Path(folder) / stage.name)
            batch = next(iter(run.get_train_dataloader()))
            batch_size = len(next(iter(batch.values())))  # samples, or prompts
            clock, run.args.max_steps = Clock(), WARM_UP + args.steps
            run.add_callback(clock)
            run.train()
            towers.store()
            trainer.prototypes = towers.copies().get("prototypes")
            prompts = stage.epochs[0] * STEPS_PER_EPOCH * batch_size  # the samples of distillation
            if stage.loss == "distillation":
                samples_of = prompts, (2 * FOLDS + 1) * prompts
            else:
                samples_of = visits(stage), cross_fitted(stage)
            yield stage.name, *samples_of, clock.milliseconds() / batch_size
        encoded = trainer.record()["features"]
        milliseconds = 1000 * encoded["seconds"] / (encoded["encoded"] + len(validation))
        views = training_args.cached_views
        yield "encoding", views * IMAGES, (views + 1) * IMAGES, milliseconds


def visits(stage: Stage) -> int:
    """The images that all variants and runs of a stage see."""
    of_each = [
        variant.epochs[0] * (IMAGES if variant.sampling == ["natural"] else VISITS)
        for variant in stage.variants(VISITS / IMAGES)
    ]
    return sum(of_each) + (stage.runs - 1) * max(of_each)


def cross_fitted(stage: Stage) -> float:
    """The images that a stage sees where folds choose, then train without a choice; then all do."""
    settled = stage.runs * max(
        variant.epochs[0] * (IMAGES if variant.sampling == ["natural"] else VISITS)
        for variant in stage.variants(VISITS / IMAGES)
    )
    return (FOLDS - 2) * visits(stage) + (FOLDS - 1) * settled + settled


def run_side(
    side: str, args: argparse.Namespace
) -> tuple[list[tuple[str, float, float, float]], float]:
    """One round of a side, and the most memory that it took, in MB: the GPU's, or else in RAM."""
    train, domain_file = (article, "article.yaml") if side == "article" else (ours, "domain.yaml")
    domain = Domain.load(DOMAINS / "architecture" / domain_file)
    torch.manual_seed(0)
    config, pixels = SIZES[args.size]
    base = CLIPTokenizer.from_pretrained(DOMAINS / "facades" / "base")
    # So many words that a prompt takes as many tokens as with CLIP's own: 13.3, and 26 at most.
    tokenizer = base.train_new_from_iterator(domain.prompt_bank[0], 1550, show_progress=False)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    images = CLIPImageProcessorPil(size={"shortest_edge": pixels}, crop_size=pixels)
    model, processor = CLIPModel(config).to(DEVICE), CLIPProcessor(images, tokenizer)
    with quiet_datasets():
        times = list(train(args, domain, drawings(domain), model, processor))
    if DEVICE.type == "cuda":
        return times, torch.cuda.max_memory_allocated() / 2**20
    return times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def drawings(domain: Domain) -> Dataset:
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
        row |= {"sha256": f"{index:064x}", "repeats": round(VISITS / DRAWN)}
        rows.append(row | unused)
    return Dataset.from_list(rows, features=features(domain.class_names))


def main() -> None:
    """The command line: both sides in turn, then whole schedules projected from the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[1])
    parser.add_argument("--size", choices=SIZES, default="vit-b-32")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of each stage in a round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training_speed.json"))
    args = parser.parse_args()
    times, peaks = [], {}
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:  # which spawns
        for side in ["article", "ours"] * args.rounds:
            of_side, peaks[side] = pool.submit(run_side, side, args).result()
            times += [(side, *of_stage) for of_stage in of_side]
    named = ["side", "stage", "samples", "cross-fitted"]
    rounds = pd.DataFrame(times, columns=[*named, "ms a sample"])
    of_stage = rounds.groupby(named, sort=False)["ms a sample"]
    stages = of_stage.agg(["median", "min", "max"]).reset_index()
    stages["hours"] = stages["samples"] * stages["median"] / 3.6e6
    stages["hours in folds"] = stages["cross-fitted"] * stages["median"] / 3.6e6
    sides = stages.groupby("side")[["hours", "hours in folds"]].sum().assign(**{"peak MB": peaks})
    where = {"threads": torch.get_num_threads(), "device": DEVICE.type}
    tables = {"rounds": rounds.to_dict("records"), "sides": sides.to_dict("index")}
    write_json(args.out, tables | {"settings": {n: str(v) for n, v in vars(args).items()} | where})
    print(stages.round(2).to_string(index=False), sides.round(2), sep="\n\n")
    print(f"\nours is {sides.hours['article'] / sides.hours['ours']:.1f} times as fast")
    share = sides.loc["ours", "hours in folds"] / sides.hours["article"]
    print(f"cross-fitted, {FOLDS} folds and the final model: {share:.2f} of the article's hours")


if __name__ == "__main__":
    main()
