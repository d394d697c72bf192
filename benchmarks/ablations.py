"""python -m benchmarks.ablations [DOMAIN] [--images FOLDER] [--base MODEL] [--seeds 701 702 703] [--table-only]

What each choice in our recipe is worth: variants with one change each, on the same data and the
same test images. Writes the domain's table into docs/ablations.md and
docs/images/ablations_DOMAIN.png and .svg. Started twice, the two processes share the work.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.comparison import OURS, footnote, markdown_table, summary
from benchmarks.recipes import (
    options,
    prepared,
    run_jobs,
    run_recipe,
    stored,
    training_of,
    wise_ft,
    with_overrides,
)
from model_card.figures import BASE, INK, STYLE, TUNED
from nicheclip.domain import Domain
from nicheclip.files import write_json
from nicheclip.training.arguments import StagedTrainingArguments

DOCS = Path(__file__).parents[1] / "docs"
ARTICLE_RATES = (5e-6, 5e-7)
WISE_FT = "wise_ft"
INTRO = """# Ablations

Variants of the recipe of a domain, each with one change, on the same data and the same test images.
Written by `python -m benchmarks.ablations DOMAIN`.
"""


@dataclass(frozen=True)
class Variant:
    """One change to ours: keys of the domain that are replaced, and those of them that need other data."""

    title: str
    overrides: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def variants(domain: Domain) -> dict[str, Variant]:
    """All that differ from ours in this domain, which comes first."""
    stages = [stage.model_dump() for stage in domain.stages]
    last, epochs = stages[-1], sum(stage["epochs"] for stage in stages)

    def rates(rate: Callable[[int, float], float]) -> dict[str, Any]:
        return {
            "stages": [
                stage | {"learning_rate": rate(index, stage["learning_rate"])}
                for index, stage in enumerate(stages)
            ]
        }

    def one_stage(like: dict[str, Any], rate: float) -> dict[str, Any]:
        return {"stages": [like | {"name": "all", "epochs": epochs, "learning_rate": rate}]}

    def setting(name: str, value: Any) -> dict[str, Any]:
        fallback = StagedTrainingArguments.__dataclass_fields__[name].default
        return (
            {}
            if domain.training.get(name, fallback) == value
            else training_of(domain, **{name: value})
        )

    first_rate = stages[0]["learning_rate"]
    no_filter = domain.quality_filter.model_dump(mode="json") | {"mode": "none", "threshold": None}
    listed = {
        "no_filter": Variant("no quality filter", data={"quality_filter": no_filter}),
        "one_stage_fast": Variant(f"one stage at {_rate(first_rate)}", one_stage(last, first_rate)),
        "one_stage_slow": Variant(
            f"one stage at {_rate(last['learning_rate'])}",
            one_stage(last, last["learning_rate"]),
        ),
        "reversed": Variant("stages in reverse order", {"stages": stages[::-1]}),
        "text_only": Variant(f"stage “{stages[0]['name']}” only", one_stage(stages[0], first_rate)),
        "cluster_0": Variant("cluster share 0", setting("cluster_share", 0.0)),
        "cluster_0.5": Variant("cluster share 0.5", setting("cluster_share", 0.5)),
        "cluster_0.8": Variant("cluster share 0.8", setting("cluster_share", 0.8)),
        "multi_positive": Variant("loss multi_positive", setting("loss", "multi_positive")),
        "info_nce": Variant("loss info_nce", setting("loss", "info_nce")),
        "class_prompts": Variant("loss class_prompts", setting("loss", "class_prompts")),
        "smoothing_0": Variant("label smoothing 0", setting("label_smoothing_factor", 0.0)),
        "rates_third": Variant("learning rates × 1/3", rates(lambda _, rate: rate / 3)),
        "rates_triple": Variant("learning rates × 3", rates(lambda _, rate: rate * 3)),
        "rates_article": Variant(
            "learning rates 5e-6 and 5e-7", rates(lambda index, _: ARTICLE_RATES[min(index, 1)])
        ),
        "rates_1e-5": Variant("learning rate 1e-5 in all stages", rates(lambda *_: 1e-5)),
        "views_0": Variant("a new view at each visit", setting("cached_views", 0)),
        **{
            f"views_{count}": Variant(f"{count} views", setting("cached_views", count))
            for count in (2, 4, 8, 16)
        },
        "batch_16": Variant("batch 16", setting("per_device_train_batch_size", 16)),
    }
    different = {
        name: variant
        for name, variant in listed.items()
        if with_overrides(domain, variant.overrides | variant.data) != domain
    }
    if str(domain.training.get("wise_ft", "1")) in ("1", "1.0"):
        different[WISE_FT] = Variant("WiSE-FT auto")
    else:
        different["no_wise_ft"] = Variant("no WiSE-FT", training_of(domain, wise_ft="1"))
    return {OURS: Variant("ours")} | different


def _rate(rate: float) -> str:
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def main() -> None:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="where ablations.md and images/ lie"
    )
    args = parser.parse_args()
    domain = Domain.load(args.domain, base=args.base)
    out = args.out or Path("runs/benchmarks") / f"ablations-{domain.name}"
    listed = variants(domain)
    if unknown := sorted(set(args.only or []) - set(listed)):
        parser.error(f"--only {unknown[0]}: expected of {', '.join(listed)}")
    failures = 0
    if not args.table_only:
        failures = run_jobs(
            [
                (
                    f"{name}, seed {seed}",
                    partial(run, name, listed[name], domain, args.images, seed, out),
                )
                for seed in args.seeds
                for name in args.only or listed
            ]
        )
    rows, notes = table(domain, listed, args.seeds, out)
    if rows:
        print("\n\n".join(["", markdown_table("variant", rows), *notes]))
        write_json(out / "ablations.json", {"domain": domain.name, "rows": rows, "notes": notes})
        if listed[OURS].title in rows:
            draw(domain, rows, args.docs / "images")
            write_docs(args.docs / "ablations.md", domain, markdown_table("variant", rows), notes)
    sys.exit(bool(failures))


def run(
    name: str, variant: Variant, domain: Domain, images: str | None, seed: int, out: Path
) -> dict[str, Any]:
    """The result of one variant with one seed."""
    data_run = prepared(domain, images, seed, out, variant.data)
    if name == WISE_FT:
        return wise_ft(data_run, seed, out)
    return run_recipe(data_run, name, variant.overrides, seed, out, keep_model=name == OURS)


def table(
    domain: Domain, listed: dict[str, Variant], seeds: list[int], out: Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A row for each variant that is there, and what is to be said below the table."""
    found = {name: stored(out, name, seeds, domain) for name in listed}
    missing = [
        f"{name}-{seed}"
        for name, results in found.items()
        for seed in seeds
        if results and seed not in {result["seed"] for result in results}
    ]
    rows = {listed[name].title: summary(found[name], found[OURS]) for name in listed if found[name]}
    if not rows:
        print(f"nothing in {out} yet")
        return {}, []
    epochs = sum(stage.epochs for stage in domain.stages)
    notes = [
        footnote(rows, domain),
        "One stage: what the last stage trains, from the beginning; it and "
        f"“{domain.stages[0].name}” only have {epochs} epochs, as ours has in all.",
    ]
    if found.get(WISE_FT):
        alphas = ", ".join(f"{result['alpha']:g}" for result in found[WISE_FT])
        notes.append(
            f"WiSE-FT: validation chose {alphas} parts fine-tuned; nothing was trained again."
        )
    if missing:
        notes.append(f"Missing: {', '.join(missing)}.")
    return rows, notes


def draw(domain: Domain, rows: dict[str, dict[str, Any]], folder: Path) -> None:
    """Each variant's difference to ours in points of accuracy, with its paired interval."""
    compared = {title: row["difference"] for title, row in rows.items() if row["difference"]}
    if not compared:
        return
    ours = next(row for row in rows.values() if row["difference"] is None)
    values, lows, highs = (
        100 * np.array([difference[key] for difference in compared.values()])
        for key in ("value", "low", "high")
    )
    heights = np.arange(len(compared))[::-1]
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": "ablations"}):
        figure = Figure(figsize=(8, 0.32 * len(compared) + 1.5), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=BASE, linewidth=1.5, zorder=0)
        axes.hlines(heights, lows, highs, color=TUNED, linewidth=1.6)
        clear = (lows > 0) | (highs < 0)
        axes.scatter(
            values, heights, s=42, color=np.where(clear, TUNED, "white"), edgecolor=TUNED, zorder=3
        )
        axes.set_yticks(heights, list(compared))
        axes.set_ylim(-0.6, len(compared) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set(
            xlabel="points of test accuracy, 95 % interval paired by image; filled: leaves out 0"
        )
        axes.xaxis.label.set_color(INK)
        title = f"{domain.title}\none change each against ours ({ours['accuracy']['value']:.1%}, the grey line)"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        folder.mkdir(parents=True, exist_ok=True)
        for ending, metadata in (("png", {}), ("svg", {"Date": None})):
            figure.savefig(folder / f"ablations_{domain.name}.{ending}", metadata=metadata)


def write_docs(path: Path, domain: Domain, markdown: str, notes: list[str]) -> None:
    """Puts table and notes between the domain's markers; all other text stays as it is."""
    text = path.read_text(encoding="utf-8") if path.is_file() else INTRO
    start, end = f"<!-- table:{domain.name} -->", "<!-- /table -->"
    block = "\n\n".join([start, markdown, *notes, end])
    places = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if places.search(text):
        text = places.sub(lambda _: block, text, count=1)
    else:
        picture = f"![Each change's gain or loss in accuracy](images/ablations_{domain.name}.png)"
        text = "\n\n".join([text.rstrip(), f"## {domain.title}", picture, block]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
