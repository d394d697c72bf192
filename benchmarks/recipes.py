"""python -m benchmarks.recipes [DOMAIN] [--images FOLDER ...] [--base MODEL] [--seeds 701 702 703]

What our recipe is worth beside rivals (the base as it is, probes, few-shot heads, ways of
fine-tuning, the article's), and what each part of it is worth: variants with one change each. All
on the same data and the same test images; rivals choose their rates on validation as ours does.
Writes the domain's table into docs/ablations.md.

Each recipe and seed has a folder of its own under OUT with a result.json: an interrupted benchmark
goes on where it was. It reads the test split, which is its to name: nothing is chosen by it.
"""

import argparse
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import train
from benchmarks.comparison import OURS, footnote, markdown_table, summary, write_docs
from benchmarks.judge import Result, evaluate, on_features, zero_shot
from benchmarks.lora import clip_lora
from benchmarks.rivals import linear, lp_plus_plus, strong, tip_adapter_f
from data_prep.prepare import DATA_SETTINGS, prepare
from nicheclip.clip import load_clip
from nicheclip.domain import Domain
from nicheclip.files import read_json, write_json
from nicheclip.recipe import RECIPES
from nicheclip.training.callbacks import TrainingInterrupted

ROOT = Path(__file__).parents[1]
RATES = [1e-5, 1e-4, 1e-3]  # of rivals; validation chooses


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
        overrides: top-level keys of the domain that are replaced; those that the data depends on
            get data of their own.
        run: what gives the result if nothing is trained: (data run, domain) -> result.
    """

    title: str
    overrides: dict[str, Any] = field(default_factory=dict)
    run: Callable[[Path, Domain], Result] | None = None


def recipes(domain: Domain) -> dict[str, Recipe]:
    """Rivals, ours, and ours with one change each."""
    named = {name: {"recipe": name, "stages": each["stages"]} for name, each in RECIPES.items()}
    article = named["article"] | {"training": RECIPES["article"]["training"]}
    head, visual, text = RECIPES["default"]["stages"]
    tuned = {"epochs": 10, "learning_rate": RATES, "sampling": "natural", "keep": "best"}
    tower = {"train": ["vision_model.*", "visual_projection.*"]}
    alone = {"train": ["prototypes"], "start": "base", "supcon": 0.0}
    no_filter = domain.quality_filter.model_dump(mode="json") | {"mode": "none", "threshold": None}

    def stages(*each: dict[str, Any], **training: Any) -> dict[str, Any]:
        return {"recipe": None, "stages": list(each), "training": domain.training | training}

    def ours(of_head: dict[str, Any], of_visual: dict[str, Any]) -> dict[str, Any]:
        return stages(head | of_head, visual | of_visual, text)

    prototypes = {"name": "tower", **tuned, "train": ["prototypes", *tower["train"]]}
    everything = {"name": "all", **tuned, "train": ["*"]}
    rates = [1e-4, 1e-3, 1e-2]
    projection = {**tuned, "train": ["visual_projection.*"], "learning_rate": rates, "epochs": 20}
    plain = {"wise_ft": "1"}
    rivals = {
        "zero_shot": Recipe("zero-shot, one prompt a class", run=zero_shot),
        "zero_shot_ensemble": Recipe(
            "zero-shot, prompt ensemble", run=partial(zero_shot, ensemble=True)
        ),
        "linear_probe": Recipe("linear probe", run=partial(on_features, rival=linear)),
        "strong_probe": Recipe("strong probe", run=partial(on_features, rival=strong)),
        "lp_plus_plus": Recipe("LP++", run=partial(on_features, rival=lp_plus_plus)),
        "tip_adapter_f": Recipe("Tip-Adapter-F", run=partial(on_features, rival=tip_adapter_f)),
        "clip_lora": Recipe("CLIP-LoRA", run=clip_lora),
        "projection": Recipe("projection alone", stages({"name": "map", **projection}, **plain)),
        "full": Recipe("all weights at once", stages(everything, **plain)),
        "flyp": Recipe("FLYP + WiSE-FT", stages(everything | {"loss": "info_nce"}, wise_ft="auto")),
        "lp_ft": Recipe("LP-FT + WiSE-FT", stages(head | alone, prototypes, text)),
        "article": Recipe("the article's recipe", article),
        "text_first": Recipe("text first (the old default)", named["text_first"]),
        OURS: Recipe("ours"),
    }
    variants = {
        "no_filter": Recipe("no quality filter", {"quality_filter": no_filter}),
        "start_base": Recipe("start: base only", ours({"start": "base"}, {})),
        "start_lda": Recipe("start: LDA only", ours({"start": "lda"}, {})),
        "balanced": Recipe("balanced only", ours({"sampling": "balanced"}, {})),
        "no_supcon": Recipe("no SupCon", ours({"supcon": 0.0}, {"supcon": 0.0})),
        "no_wise_ft": Recipe("not mixed with the base", stages(head, visual, text, **plain)),
        "learned_scale": Recipe(
            "learned logit_scale",
            ours({"train": [*head["train"], "logit_scale"]}, {}),
        ),
        "head_only": Recipe("no visual stage", stages(head, text)),
        "one_run": Recipe("one visual run", ours({}, {"runs": 1})),
        "unmixed": Recipe("visual stage not mixed", ours({}, {"mix": 1.0})),
        "three_blocks": Recipe("three visual blocks", ours({}, {"last_visual_blocks": 3})),
        "all_patches": Recipe("no patch dropout", ours({}, {"patch_dropout": 0.0})),
        "no_clusters": Recipe("cluster share 0", stages(head, visual, text, cluster_share=0.0)),
        "views_8": Recipe("8 views", stages(head, visual, text, cached_views=8)),
    }
    return rivals | (variants if domain.recipe == "default" else {})


def fine_tune(recipe_run: Path, data_run: Path, domain: Domain, seed: int) -> Result:
    """Trains on the data of `data_run` with the stages and settings of `domain`."""
    (recipe_run / "data").symlink_to((data_run / "data").resolve(), target_is_directory=True)
    domain.save(recipe_run / "domain.yaml")
    cache = (data_run / "cache" / "features").absolute()  # alike for all recipes
    train.train([str(recipe_run), "--seed", str(seed), "--feature_cache", str(cache)])
    trained = read_json(recipe_run / "training.json", "")
    result = evaluate(*load_clip(recipe_run / "model"), domain, data_run)
    for large in ("checkpoints", "cache", "model"):
        shutil.rmtree(recipe_run / large, ignore_errors=True)
    return result | {"stages": trained["stages"], "alpha": trained["wise_ft"]["alpha"]}


def prepared(domain: Domain, images: str | None, seed: int, out: Path, name: str) -> Path:
    """OUT/NAME-SEED, a run directory that holds the prepared data; made anew if it would differ."""
    run = out / f"{name}-{seed}"
    keys = {"base", "source", "classes", "clusters", "retention", *DATA_SETTINGS}
    made_of = domain.model_dump(mode="json", include=keys) | {"images": images, "seed": seed}
    record = run / "made_of.json"
    if not (record.is_file() and read_json(record, "") == made_of):
        print(f"{run.name}: preparing …", flush=True)
        record.unlink(missing_ok=True)
        prepare(domain, run, images, seed)
        write_json(record, made_of)
    return run


def result_of(name: str, recipe: Recipe, domain: Domain, seed: int, args: Any) -> Result:
    """The result of a recipe with one seed: what lies there, if it was made of the same."""
    domain = Domain.model_validate(domain.model_dump(mode="json") | recipe.overrides)
    own_data = sorted(set(recipe.overrides) & DATA_SETTINGS)
    data_run = prepared(domain, args.images[seed], seed, args.out, "-".join(["data", *own_data]))
    data = read_json(data_run / "data" / "report.json", "")["fingerprint"]
    made_of = json.loads(json.dumps({"domain": domain.model_dump(mode="json"), "data": data}))
    run = args.out / f"{name}-{seed}"
    if (run / "result.json").is_file():
        found = read_json(run / "result.json", "")
        if found["made_of"] == made_of:
            return found
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    started = time.perf_counter()
    with (run / "log.txt").open("w", encoding="utf-8") as log:
        with redirect_stdout(log), redirect_stderr(log):
            if recipe.run is not None:
                result = recipe.run(data_run, domain)
            else:
                result = fine_tune(run, data_run, domain, seed)
    seconds = round(time.perf_counter() - started, 1)
    result |= {"name": name, "seed": seed, "seconds": seconds, "made_of": made_of}
    write_json(run / "result.json", result)
    print(f"{name}, seed {seed}: accuracy {result['accuracy']:.1%}, {seconds:.0f} s", flush=True)
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("domain", nargs="?", default="domains/facades", help="a domain file")
    told = "class folders or a dataset instead of the domain's own; several: one for each seed"
    parser.add_argument("--images", nargs="+", help=told)
    parser.add_argument("--base", help="a Hub id or a folder instead of the domain's own base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[701, 702, 703])
    parser.add_argument("--out", type=Path, help="where the runs lie")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these recipes only")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where ablations.md lies")
    args = parser.parse_args()
    domain = Domain.load(args.domain, base=args.base).model_copy(update={"evaluation": "holdout"})
    args.out = args.out or Path("runs/benchmarks") / f"recipes-{domain.name}"
    listed = recipes(domain)
    images = args.images or [None]
    if len(images) not in (1, len(args.seeds)):
        parser.error(f"--images has {len(images)} folders; expected one, or one for each seed")
    args.images = dict(zip(args.seeds, cycle(images), strict=False))
    if unknown := sorted(set(args.only or []) - set(listed)):
        parser.error(f"--only {unknown[0]}: expected of {', '.join(listed)}")
    found: dict[str, list[Result]] = {}
    failures = 0
    for name in args.only or listed:
        for seed in args.seeds:
            try:
                result = result_of(name, listed[name], domain, seed, args)
                found.setdefault(name, []).append(result)
            except TrainingInterrupted as interrupted:
                sys.exit(128 + interrupted.signal)
            except Exception as error:  # hours of other runs should not be lost with it
                failures += 1
                print(f"{name}, seed {seed}: failed: {error}", flush=True)
                traceback.print_exc()
    ours = found.get(OURS, [])
    rows = {listed[name].title: summary(results, ours) for name, results in found.items()}
    if rows:
        note = footnote(rows, domain)
        print("\n\n".join(["", markdown_table(rows), note]))
        write_json(args.out / "recipes.json", {"domain": domain.name, "rows": rows, "note": note})
    if ours and not args.only:
        write_docs(args.docs / "ablations.md", domain, markdown_table(rows), note)
    if failures:
        sys.exit(f"{failures} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
