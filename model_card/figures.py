"""The five figures of a scorecard: gates, confusions, classes, reliability, OOD pictures."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.stats import binomtest
from sklearn.manifold import TSNE

from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import METRIC_TITLES, Measure, Verdict
from nicheclip.evaluation.metrics import N_BINS, class_scores, confusion_matrix, reliability
from nicheclip.evaluation.ood import KINDS
from nicheclip.evaluation.predictions import Outputs

BASE, PROBE, STRONG_PROBE, TUNED = "#9AA0A6", "#009E73", "#CC79A7", "#0072B2"
GATE, INK = "#D55E00", "#333333"
# Okabe and Ito's colours, safe for colour-blind readers, then two more for domains with many
# clusters.
CLUSTER_COLOURS = (
    "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #B8A800 #000000 #7B4FA3 #8C6D46".split()
)
MARKERS = ["o", "^", "s", "D", "v", "P"]
MOST_CLASSES = 60  # of a figure with a row a class
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}


def draw_figures(
    folder: Path,
    domain: Domain,
    tuned: Outputs,
    base: Outputs,
    measures: dict[str, Measure],
    gates: dict[str, Verdict],
) -> None:
    """Writes scorecard, confusion, classes, reliability and outside, each as PNG and SVG."""
    with matplotlib.rc_context(STYLE):
        for name, figure in {
            "scorecard": _scorecard(domain, measures, gates),
            "confusion": _confusion(domain, tuned),
            "classes": _classes(domain, tuned, base),
            "reliability": _reliability(tuned, base, measures),
            "outside": _outside(tuned, measures),
        }.items():
            for suffix in ("png", "svg"):
                figure.savefig(folder / f"{name}.{suffix}")


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def _scorecard(domain: Domain, measures: dict[str, Measure], gates: dict[str, Verdict]) -> Figure:
    figure, axes = _figure(8, 0.62 * len(gates) + 1.2)
    names = list(gates)[::-1]
    shown, heights = [measures[name] for name in names], np.arange(len(names))
    for offset, colour, label, row in (
        (-0.3, BASE, "base zero-shot", [each.base for each in shown]),
        (-0.1, PROBE, "linear probe", [each.probe for each in shown]),
        (0.1, STRONG_PROBE, "strong probe", [each.strong_probe for each in shown]),
        (0.3, TUNED, "fine-tuned", shown),
    ):
        bars = [(y + offset, each.value, each.low, each.high) for y, each in enumerate(row) if each]
        if bars:
            places, values, low, high = np.array(bars).T
            errors = np.maximum(0, [values - low, high - values])
            look: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 3, "label": label}
            axes.errorbar(values, places, xerr=errors, **look)
    if names:
        targets = [domain.gates[name] for name in names]
        axes.vlines(targets, heights - 0.38, heights + 0.38, color=GATE, linewidth=2, label="gate")
        figure.legend(loc="outside lower center", ncols=5)
    else:
        axes.text(0.5, 0.5, "no gates in the domain file", ha="center", va="center")
    for height, name in enumerate(names):
        verdict = f"{gates[name].target}  {gates[name].verdict}"
        axes.text(1.02, height, verdict, va="center", transform=axes.get_yaxis_transform())
    ticks = [f"{METRIC_TITLES[name]}\n{measures[name].n} {measures[name].split}" for name in names]
    axes.set_yticks(heights, ticks, fontsize=9)
    axes.set(xlim=(0, 1), title=f"{domain.title}: scorecard on held-out images, 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _confusion(domain: Domain, tuned: Outputs) -> Figure:
    """All classes by cluster; of more than `MOST_CLASSES` those that are confused most."""
    count, order = len(domain.classes), domain.by_cluster
    matrix = confusion_matrix(tuned.predicted, tuned.labels, count)
    if count > MOST_CLASSES:
        wrong = matrix - np.diag(np.diag(matrix))
        most = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:MOST_CLASSES]
        order = order[np.isin(order, most)]
    share = (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))[np.ix_(order, order)]
    matrix = matrix[np.ix_(order, order)]
    side = 2.5 + 0.34 * len(order)
    figure, axes = _figure(side + 0.8, side)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if share[row, column] > 0.6 else INK
        axes.text(column, row, matrix[row, column], color=colour, **centred)
    _, sizes = np.unique(np.array(domain.class_clusters)[order], return_counts=True)
    for edge, size in zip(np.cumsum(sizes) - sizes - 0.5, sizes, strict=True):
        axes.add_patch(Rectangle((edge, edge), size, size, fill=False, edgecolor=GATE, lw=1.5))
    names, places = [domain.class_names[index] for index in order], range(len(order))
    axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    title = f"Confusions on {len(tuned.labels)} {tuned.exams.split} images (boxes: clusters)"
    if count > len(order):
        title += f"\n{len(order)} of {count} classes, the most confused"
    axes.set(xlabel="predicted", ylabel="labelled", title=title)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the labelled class")
    return figure


def _classes(domain: Domain, tuned: Outputs, base: Outputs) -> Figure:
    """F1 of each class, of the lowest `MOST_CLASSES` where there are more, and a map."""
    count, order = len(domain.classes), domain.by_cluster
    of_base, of_tuned = (
        class_scores(outputs.predicted, outputs.labels, count)[2] for outputs in (base, tuned)
    )
    if count > MOST_CLASSES:
        order = np.argsort(of_tuned, kind="stable")[:MOST_CLASSES]
    height = max(5.0, 0.3 * len(order) + 1.4)
    figure, (bars, scatter) = _figure(12.5, height, 2, gridspec_kw={"width_ratios": [1, 1.25]})
    heights = np.arange(len(order))[::-1]
    bars.barh(heights - 0.2, of_base[order], height=0.38, color=BASE, label="base zero-shot")
    bars.barh(heights + 0.2, of_tuned[order], height=0.38, color=TUNED, label="fine-tuned")
    counts = np.bincount(tuned.labels, minlength=count)
    names = [f"{domain.class_names[index]} ({counts[index]})" for index in order]
    bars.set_yticks(heights, names, fontsize=8)
    which = "each class" if len(order) == count else f"the worst {len(order)} of {count} classes"
    bars.set(xlim=(0, 1), title=f"F1 of {which} ({tuned.exams.split} images)")
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=2)

    shown = tuned.exams.round_of == 0  # image_embeds of different folds don't compare
    perplexity = min(30, (shown.sum() - 1) / 3)
    projection = TSNE(perplexity=perplexity, init="pca", random_state=0)
    places = projection.fit_transform(tuned.embeds[0][tuned.exams.asked[shown]])  # (N, 2)
    for cluster, members in enumerate(domain.clusters.values()):
        colour = CLUSTER_COLOURS[cluster % len(CLUSTER_COLOURS)]
        for position, name in enumerate(members):
            x, y = places[tuned.labels[shown] == domain.class_names.index(name)].T
            marker = MARKERS[position % len(MARKERS)]
            look: dict[str, Any] = {"s": 14, "alpha": 0.75, "linewidths": 0}
            scatter.scatter(x, y, color=colour, marker=marker, label=name, **look)
    what = "the first fold's" if tuned.exams.cross_fitted else "the fine-tuned"
    title = f"Map of {what} image_embeds (t-SNE; colour: cluster)"
    scatter.set(xticks=[], yticks=[], title=title)
    scatter.spines[:].set_visible(False)
    if count <= MOST_CLASSES:
        scatter.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, markerscale=1.4)
    return figure


def _reliability(tuned: Outputs, base: Outputs, measures: dict[str, Measure]) -> Figure:
    figure, (before, after, risk) = _figure(12, 3.9, 3)
    for axes, probabilities, name, title in (
        (before, tuned.raw, "ece_before_calibration", "before"),
        (after, tuned.calibrated, "ece", "after"),
    ):
        confidence, accuracy, counts = reliability(probabilities.max(axis=1), tuned.right)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
        centres = (np.arange(N_BINS) + 0.5) / N_BINS
        shares: dict[str, Any] = {"color": BASE, "alpha": 0.35, "label": "share of images"}
        axes.bar(centres, counts / counts.sum(), width=1 / N_BINS, **shares)
        confidence, accuracy, counts = (each[counts > 0] for each in (confidence, accuracy, counts))
        hits = np.rint(accuracy * counts).astype(int).tolist()
        tests = [binomtest(*pair) for pair in zip(hits, counts.tolist(), strict=True)]
        ends = [each.proportion_ci(method="wilson") for each in tests]
        points: dict[str, Any] = {"color": TUNED, "marker": "o", "markersize": 4, "linewidth": 1}
        errors = np.abs(np.array(ends).T - accuracy)
        axes.errorbar(confidence, accuracy, errors, label="accuracy, 95 % interval", **points)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", aspect="equal")
        axes.set_title(f"{title}: ECE {measures[name]}")
    before.set_ylabel(f"accuracy ({len(tuned.labels)} {tuned.exams.split} images)")
    before.legend(loc="upper left", fontsize=8)
    told = f"a perfectly calibrated model\nwould show {measures['ece_of_perfect']}"
    after.text(0.02, 0.97, told, va="top", fontsize=8)

    for outputs, colour, label in ((base, BASE, "base zero-shot"), (tuned, TUNED, "fine-tuned")):
        wrong = ~outputs.right[np.argsort(-outputs.confidence, kind="stable")]
        answered = np.arange(1, len(wrong) + 1)
        risk.plot(answered / len(wrong), np.cumsum(wrong) / answered, color=colour, label=label)
    dashed: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1}
    risk.axvline(measures["coverage"].value, label="answered; else “not sure”", **dashed)
    risk.set(xlim=(0, 1), ylim=(0, None), xlabel="share of images answered")
    risk.set(ylabel="share of wrong answers", title=f"Errors: AURC {measures['aurc']}")
    risk.legend(fontsize=8)
    return figure


def _outside(tuned: Outputs, measures: dict[str, Measure]) -> Figure:
    """The score that decides, of the images and of each kind of OOD picture."""
    score, threshold = tuned.ood["score"], tuned.ood["threshold"]
    accepted = dict(zip([*KINDS, "images"], [*tuned.ood_accepted, tuned.accepted], strict=True))
    of_kinds = dict(zip(KINDS[::-1], tuned.ood_scores[score][::-1], strict=True))
    rows = of_kinds | {"images": tuned.own_scores[score]}
    figure, axes = _figure(8, 0.42 * len(rows) + 1.3)
    for height, (name, values) in enumerate(rows.items()):
        jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(values))
        colour = TUNED if name == "images" else GATE
        axes.scatter(values, height + jitter, s=6, alpha=0.35, linewidths=0, color=colour)
        told = f"{accepted[name].mean():.0%} accepted, n = {len(values)}"
        axes.text(1.02, height, told, va="center", transform=axes.get_yaxis_transform(), fontsize=9)
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    name = score.replace("_", " ")
    axes.set_xlabel(f"{name}; left of the line the answer is “outside my domain”")
    axes.set_title(f"Is it of the domain? AUROC {measures['ood_auroc']}")
    return figure
