"""The second tab: what calibrate.py measured, as figures and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from nicheclip.evaluation.intervals import LOWER_IS_BETTER, METRIC_TITLES, Measure
from nicheclip.files import read_json

NBSP = "\N{NO-BREAK SPACE}"
VERDICTS = {
    "pass": f"✓{NBSP}pass",
    "fail": f"✗{NBSP}fail",
    "undecided": f"?{NBSP}undecided",
    "": "",
}
# Alternative texts, for those who can't see the figures.
FIGURES = {
    "scorecard": "Each metric with a gate, base zero-shot and fine-tuned; see the table",
    "classes": "F1 of each class, and a map of the test pictures: similar ones lie together",
    "confusion": "Confusion matrix: which class is taken for which, side by side by cluster",
    "reliability": "Accuracy against confidence before and after calibration; selective errors",
    "outside": "How much test pictures, noise, textures and other OOD pictures look alike",
}


def read_measures(folder: Path) -> dict[str, Measure]:
    """The metrics of a published folder's scorecard, by name."""
    return {name: Measure.from_dict(fields) for name, fields in _read(folder)["metrics"].items()}


def _read(folder: Path) -> dict[str, Any]:
    return read_json(
        folder / "scorecard.json", "build the folder again with `python -m model_card RUN`"
    )


def scorecard_tab(folder: Path) -> None:
    """Lays out the tab of a published folder, inside of a `gr.Tab`."""
    measures, gates = read_measures(folder), _read(folder)["gates"]
    passed = sum(gate["verdict"] == "pass" for gate in gates.values())
    undecided = sum(gate["verdict"] == "undecided" for gate in gates.values())
    accuracy, coverage = measures["accuracy"], measures["coverage"]
    right = (
        f", and {percent(measures['selective_accuracy'].value)} of its answers were right"
        if coverage.value
        else ""
    )
    gr.Markdown(
        f"**{passed} of {len(gates)} gates passed, {undecided} undecided.** On {accuracy.n} "
        f"{accuracy.split} pictures that took no part in training, choice of the epoch, or "
        f"calibration. The model answered {percent(coverage.value)} of them{right}; for the "
        "others it said “not sure”."
    )
    figures = sorted(
        (folder / "figures").glob("*.png"), key=lambda path: (path.stem != "scorecard", path.stem)
    )
    for path in figures[:1]:
        _figure(path)
    gr.Markdown(score_table(measures, gates), elem_classes="scores")
    for path in figures[1:]:
        _figure(path)


def _figure(path: Path) -> None:
    alt_text = FIGURES.get(path.stem, path.stem)
    gr.Image(
        str(path), show_label=False, alt_text=alt_text, interactive=False, buttons=["fullscreen"]
    )


def score_table(measures: dict[str, Measure], gates: dict[str, dict[str, str]]) -> str:
    """A Markdown table, metrics with a gate first."""
    rows = [
        f"| Metric | Base zero-shot | Linear probe | Fine-tuned [95{NBSP}%] | Gate | Verdict | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(
        measures, key=lambda name: (name not in gates, list(METRIC_TITLES).index(name))
    ):
        measure, gate = measures[name], gates.get(name, {"target": "", "verdict": ""})
        probe = f"{measure.probe.value:.3f}" if measure.probe else ""
        label = METRIC_TITLES[name] + (f"{NBSP}↓" if name in LOWER_IS_BETTER else "")
        base = f"{measure.base.value:.3f}" if measure.base else ""
        verdict = VERDICTS[gate["verdict"]] + (
            f" (needs {gate['more']:,} more images)" if gate.get("more") else ""
        )
        n = f"{measure.n} {measure.split}"
        rows.append(
            f"| {label} | {base} | {probe} | **{measure.value:.3f}** "
            f"[{measure.low:.3f},{NBSP}{measure.high:.3f}] | {gate['target'].replace(' ', NBSP)} "
            f"| {verdict} | {n} |"
        )
    legend = (
        "↓ lower is better. Base zero-shot: the model before fine-tuning. Linear probe: logistic "
        "regression on the base's image_embeds. All on the same pictures. Undecided: the interval "
        "holds the gate's target."
    )
    return "\n".join([*rows, "", legend])


def percent(share: float, digits: int = 0) -> str:
    """As a person writes it: 78 %."""
    return f"{100 * share:.{digits}f}{NBSP}%"
