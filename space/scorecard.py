"""The second tab: what calibrate.py measured, as figures and as a table."""

from pathlib import Path
from typing import Any

import gradio as gr

from nicheclip.evaluation.intervals import LOWER_IS_BETTER, METRIC_TITLES, Measure
from nicheclip.files import read_json

NBSP = "\N{NO-BREAK SPACE}"
SIGNS = {"pass": "✓", "fail": "✗", "undecided": "?"}
# In this order; for those who can't see them.
FIGURES = {
    "scorecard": "Each metric with a gate, base zero-shot and fine-tuned; see the table",
    "classes": "F1 of each class, and a map of pictures: similar ones lie together",
    "confusion": "Confusion matrix: which class is taken for which, side by side by cluster",
    "outside": "How much pictures of the domain, noise, textures and other OOD pictures look alike",
    "reliability": "Accuracy against confidence before and after calibration; selective errors",
}
Gates = dict[str, dict[str, Any]]


def read_scorecard(folder: Path) -> tuple[dict[str, Measure], Gates, str]:
    """The metrics of a published folder, the gates that some have, and what was examined."""
    remedy = "build the folder again with `python -m model_card RUN`"
    scorecard = read_json(
        folder / "scorecard.json", remedy, ["metrics", "gates", "ood", "evaluation"]
    )
    measures = {name: Measure(**each) for name, each in scorecard["metrics"].items()}
    return measures, scorecard["gates"], scorecard["evaluation"]


def scorecard_tab(folder: Path, measures: dict[str, Measure], gates: Gates, told: str) -> None:
    """Lays out the tab of a published folder, inside of a `gr.Tab`."""
    verdicts = [gate["verdict"] for gate in gates.values()]
    coverage = measures["coverage"]
    answers = measures.get("selective_accuracy")
    right = f", and {percent(answers.value)} of its answers were right" if answers else ""
    gr.Markdown(
        f"**{verdicts.count('pass')} of {len(gates)} gates passed, "
        f"{verdicts.count('undecided')} undecided.** {told} It answered "
        f"{percent(coverage.value)} of them{right}; for the others it said “not sure”."
    )
    for name, text in FIGURES.items():
        path = str(folder / "figures" / f"{name}.png")
        gr.Image(path, show_label=False, alt_text=text, interactive=False, buttons=["fullscreen"])
        if name == "scorecard":
            gr.Markdown(score_table(measures, gates), elem_classes="scores")


def score_table(measures: dict[str, Measure], gates: Gates) -> str:
    """A Markdown table, metrics with a gate first."""
    rows = [
        f"| Metric | Base zero-shot | Linear probe | Fine-tuned [95{NBSP}%] | Gate | Verdict | n |",
        "|---|---|---|---|---|---|---|",
    ]
    known = [name for name in METRIC_TITLES if name in measures]
    for name in sorted(known, key=lambda name: name not in gates):
        measure, target, verdict = measures[name], "", ""
        if gate := gates.get(name):
            target = gate["target"].replace(" ", NBSP)
            more = f" (needs {gate['more']:,} more images)" if gate["more"] else ""
            verdict = f"{SIGNS[gate['verdict']]}{NBSP}{gate['verdict']}{more}"
        title = METRIC_TITLES[name] + (f"{NBSP}↓" if name in LOWER_IS_BETTER else "")
        rivals = [f"{each.value:.3f}" if each else "" for each in (measure.base, measure.probe)]
        found = f"**{measure.value:.3f}** [{measure.low:.3f},{NBSP}{measure.high:.3f}]"
        cells = [title, *rivals, found, target, verdict, f"{measure.n} {measure.split}"]
        rows.append(f"| {' | '.join(cells)} |")
    legend = (
        "↓ lower is better. Base zero-shot: the model before fine-tuning. Linear probe: logistic "
        "regression on the base's image_embeds. All on the same pictures. Undecided: the interval "
        "holds the gate's target."
    )
    return "\n".join([*rows, "", legend])


def percent(share: float, digits: int = 0) -> str:
    """As a person writes it: 78 %."""
    return f"{100 * share:.{digits}f}{NBSP}%"
