"""python -m benchmarks.baselines [DOMAIN] [--images FOLDER] [--base MODEL] [--seeds 701 702 703]

What our recipe is worth beside the simpler ones: the base as it is, a linear probe, fine-tuning all
weights at once, and the article's recipe, all on the same data. Started twice, the two processes
share the work.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import OURS, footnote, markdown_table, summary
from benchmarks.recipes import options, prepared, probe, run_jobs, run_recipe, stored, zero_shot
from nicheclip.domain import Domain
from nicheclip.files import write_json

ARTICLE = Path(__file__).parents[1] / "domains" / "architecture" / "article.yaml"
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # validation chooses, all seeds together
TITLES = {
    "zero_shot": "zero-shot, one prompt a class",
    "zero_shot_ensemble": "zero-shot, prompt ensemble",
    "linear_probe": "linear probe",
    "full": "all weights at once",
    "article": "the article's recipe",
    OURS: "ours",
}


def main() -> None:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument(
        "--full-epochs", type=int, help="of all weights at once; default: as many as ours has"
    )
    args = parser.parse_args()
    domain = Domain.load(args.domain, base=args.base)
    out = args.out or Path("runs/benchmarks") / f"baselines-{domain.name}"
    if unknown := sorted(set(args.only or []) - set(TITLES)):
        parser.error(f"--only {unknown[0]}: expected of {', '.join(TITLES)}")
    epochs = args.full_epochs or sum(stage.epochs for stage in domain.stages)
    failures = 0
    if not args.table_only:
        failures = run_jobs(
            [
                (f"{name}, seed {seed}", partial(run, name, domain, args.images, seed, out, epochs))
                for seed in args.seeds
                for name in files(args.only or TITLES)
            ]
        )
    table(domain, args.seeds, out, epochs)
    sys.exit(bool(failures))


def files(recipes: Any) -> list[str]:
    """The names of the results that the rows of the table need."""
    return [
        name
        for recipe in recipes
        for name in ([full(r) for r in FULL_RATES] if recipe == "full" else [recipe])
    ]


def full(rate: float) -> str:
    """The name of training all weights at once at a rate."""
    return f"full_{rate:g}"


def run(
    name: str, domain: Domain, images: str | None, seed: int, out: Path, full_epochs: int
) -> dict[str, Any]:
    """The result of one recipe with one seed."""
    data_run = prepared(domain, images, seed, out)
    if name.startswith("zero_shot"):
        return zero_shot(data_run, name == "zero_shot_ensemble", seed, out)
    if name == "linear_probe":
        return probe(data_run, seed, out)
    return run_recipe(
        data_run, name, overrides(name, domain, full_epochs), seed, out, keep_model=name == OURS
    )


def overrides(name: str, domain: Domain, full_epochs: int) -> dict[str, Any]:
    """What a recipe that trains changes in the domain."""
    if name == OURS:
        return {}
    if name == "article":
        article = Domain.load(ARTICLE).model_dump(mode="json")
        return {"stages": article["stages"], "training": article["training"]}
    rate = next(rate for rate in FULL_RATES if full(rate) == name)
    batch = {
        key: value for key, value in domain.training.items() if key == "per_device_train_batch_size"
    }
    return {
        "stages": [{"name": "all", "epochs": full_epochs, "learning_rate": rate, "train": ["*"]}],
        "training": batch | {"loss": "multi_positive", "cluster_share": 0.0},
    }


def table(domain: Domain, seeds: list[int], out: Path, full_epochs: int) -> None:
    """Prints what is there, and writes it as OUT/baselines.json."""
    found = {name: stored(out, name, seeds, domain) for name in files(TITLES)}
    missing = [
        f"{name}-{seed}"
        for name in found
        for seed in seeds
        if seed not in {r["seed"] for r in found[name]}
    ]
    tried = {
        rate: float(np.mean([result["validation_accuracy"] for result in found[full(rate)]]))
        for rate in FULL_RATES
        if found[full(rate)]
    }
    chosen = max(tried, key=tried.__getitem__) if tried else None
    found["full"] = found[full(chosen)] if chosen else []
    rows = {TITLES[name]: summary(found[name], found[OURS]) for name in TITLES if found[name]}
    if not rows:
        print(f"nothing in {out} yet")
        return
    notes = [footnote(rows, domain)]
    if chosen:
        grid = ", ".join(f"{rate:g}: {accuracy:.1%}" for rate, accuracy in tried.items())
        epochs = sum(stage.epochs for stage in domain.stages)
        notes.append(
            f"All weights at once: {full_epochs} epochs, ours {epochs}; learning rate {chosen:g}, "
            f"the best on validation ({grid}); the seconds are of that one."
        )
    if missing:
        notes.append(f"Missing: {', '.join(missing)}.")
    print("\n\n".join(["", markdown_table("recipe", rows), *notes]))
    write_json(
        out / "baselines.json",
        {"domain": domain.name, "rows": rows, "notes": notes, "missing": missing},
    )


if __name__ == "__main__":
    main()
