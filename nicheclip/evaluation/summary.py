"""What calibrate.py says in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from nicheclip.evaluation.intervals import METRIC_TITLES, Measure, Verdict
from nicheclip.evaluation.predictions import Outputs


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A plain-text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [header, ["-" * width for width in widths], *rows]))


def scorecard_text(measures: Mapping[str, Measure], gates: Mapping[str, Verdict]) -> str:
    """All measures, those with a gate first."""
    names = [*gates, *(name for name in METRIC_TITLES if name in measures and name not in gates)]
    rows = []
    for name in names:
        found, gate = measures[name], gates.get(name)
        others = [f"{each.value:.3f}" if each else "" for each in (found.base, found.probe)]
        gain = found.difference
        gained = f"{gain.value:+.3f}{' ?' if gain.low <= 0 <= gain.high else ''}" if gain else ""
        row = [METRIC_TITLES[name], *others, str(found), gained, str(gate or "")]
        rows.append([*row, f"{found.n} {found.split}"])
    header = ["metric", "base", "probe", "fine-tuned [95 % interval]", "gained", "gate", "n"]
    return (
        f"{format_table(header, rows)}\n"
        "probe: logistic regression on the base's image_embeds; ?: the interval of the gain holds 0"
    )


def calibration_text(tuned: Outputs) -> str:
    """Temperature, abstention and the OOD threshold in words."""
    temperature, abstention = tuned.fitted.temperature, tuned.fitted.abstention
    aim = "reached" if abstention.target_reached else "not reached, so the best at half coverage"
    aurocs = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in tuned.ood.auroc.items()]
    warning = f"warning: {temperature.warning}\n" if temperature.warning else ""
    return (
        f"\ntemperature {temperature.value:.3f} [{temperature.low:.3f}, {temperature.high:.3f}]; "
        f"below a confidence of {abstention.threshold:.2f} the answer is 'not sure' (aim: "
        f"{abstention.aim.replace('_', ' ')} of {abstention.target:.0%}, {aim} on calibration)\n"
        f"{warning}"
        f"outside of the domain: {tuned.ood.score.replace('_', ' ')} below "
        f"{tuned.ood.threshold:.3f} (AUROC on calibration: {', '.join(aurocs)})"
    )
