"""What a model is worth on images that it has not seen, beside the base model and probes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from nicheclip.domain import Domain
from nicheclip.evaluation import metrics
from nicheclip.evaluation.intervals import (
    LOWER_IS_BETTER,
    METRIC_TITLES,
    Measure,
    Verdict,
    bootstrap,
    format_table,
    proportion,
)
from nicheclip.evaluation.ood import KINDS
from nicheclip.evaluation.predictions import Outputs, Predictions, Probes
from nicheclip.evaluation.robustness import CHANGES, prompt_answers


@dataclass(frozen=True)
class Statistic:
    """A number about images, and how to find its interval."""

    columns: tuple[np.ndarray, ...]  # (N,) each; where the first is NaN, an image is not judged
    groups: np.ndarray  # (N,) of near-duplicates
    metric: Callable[..., float] = np.nanmean  # of the columns
    split: str = "test"
    share: bool = False  # the mean of hits, 0 or 1
    biased: bool = False  # as in `bootstrap`

    def __call__(self, chosen: np.ndarray) -> float:
        """Of the images with these indices (M,) int."""
        return float(self.metric(*(column[chosen] for column in self.columns)))

    def measure(self) -> Measure:
        """The value on all images that are judged, with its interval."""
        judged = np.flatnonzero(~np.isnan(self.columns[0]))
        groups = self.groups[judged]
        if self.share:
            return proportion(self.columns[0][judged] > 0, groups, self.split)
        return bootstrap(lambda chosen: self(judged[chosen]), groups, self.split, self.biased)

    def minus(self, other: Self) -> Measure:
        """The difference on the same images, with the interval of the paired difference."""
        return bootstrap(lambda chosen: self(chosen) - other(chosen), self.groups, self.split)


def statistics(found: Predictions, domain: Domain) -> dict[str, Statistic]:
    """Those that any classifier has."""
    labels, right, confidence = found.labels, found.right, found.confidence
    own, answers = (np.arange(len(labels)), labels), (found.predicted, labels)
    ece = metrics.expected_calibration_error
    class_scores = partial(metrics.class_scores, num_classes=len(domain.classes))

    def of(*columns: np.ndarray, **options: Any) -> Statistic:
        return Statistic(columns, found.groups, split=found.exams.split, **options)

    def by_class(score: int, reduce: Callable[[np.ndarray], float]) -> Callable[..., float]:
        return lambda *both: reduce(class_scores(*both)[score])

    return {
        "accuracy": of(right, share=True),
        "balanced_accuracy": of(*answers, metric=by_class(1, np.nanmean)),
        "macro_f1": of(*answers, metric=by_class(2, np.nanmean)),
        "worst_class_f1": of(*answers, metric=by_class(2, np.nanmin), biased=True),
        "top_3_accuracy": of(metrics.top_k_correct(found.calibrated, labels, 3), share=True),
        "ece_before_calibration": of(found.raw.max(axis=1), right, metric=ece, biased=True),
        "ece": of(confidence, right, metric=ece, biased=True),
        "ece_equal_mass": of(confidence, right, metric=partial(ece, equal_mass=True), biased=True),
        "nll": of(-log_softmax(found.logits, axis=1)[own]),  # finite where p underflows
        "brier": of(metrics.brier(found.calibrated, labels)),
        "aurc": of(confidence, right, metric=metrics.aurc),
        "coverage": of(found.answered, share=True),
        "selective_accuracy": of(np.where(found.answered, right, np.nan), share=True),
        "conformal_coverage": of(found.sets[own], share=True),
        "conformal_worst_class": of(
            found.sets[own], labels, metric=metrics.worst_share, biased=True
        ),
        "conformal_set_size": of(found.sets.sum(axis=1)),
    }


def clip_statistics(outputs: Outputs, domain: Domain) -> dict[str, Statistic]:
    """`statistics`, and those that need image_embeds, prompts and OOD pictures."""
    labels, groups = outputs.labels, outputs.groups
    prompts = outputs.similarity, outputs.prompt_classes
    margin = metrics.hard_negative_margin(*prompts, labels, np.array(domain.class_clusters))
    rank = metrics.semantic_rank(*prompts, labels)
    found_at, precision = _image_retrieval(outputs)
    first, *others = prompt_answers(*prompts).T
    consistent = np.mean([each == first for each in others] or [np.full(len(labels), np.nan)], 0)
    noise = outputs.ood_scores["confidence"][KINDS.index("noise")]
    score, split = outputs.ood["score"], outputs.exams.split
    own, outside = outputs.own_scores[score], outputs.ood_scores[score].ravel()
    alone = np.arange(len(outside))
    both = np.append(own, outside), np.repeat([True, False], [len(own), len(outside)])
    groups_of_both = np.append(np.unique(groups, return_inverse=True)[1], len(own) + alone)

    def mean(values: np.ndarray) -> Statistic:
        return Statistic((values,), groups, split=split)

    def share(hits: np.ndarray, of: np.ndarray) -> Statistic:
        columns = (np.where(np.isnan(of), np.nan, hits),)
        return Statistic(columns, groups, split=split, share=True)

    def told_apart(metric: Callable[[np.ndarray, np.ndarray], float]) -> Statistic:
        def told(scores: np.ndarray, is_own: np.ndarray) -> float:
            return metric(scores[is_own], scores[~is_own])

        return Statistic(both, groups_of_both, told, split=f"{split} and OOD")

    found = statistics(outputs, domain) | {
        "hard_negative_pass_rate": share(margin > 0, of=margin),
        "hard_negative_margin": mean(margin),
        "semantic_recall_at_1": share(rank <= 1, of=rank),
        "semantic_recall_at_3": share(rank <= 3, of=rank),
        "semantic_recall_at_5": share(rank <= 5, of=rank),
        "semantic_mrr": mean(1 / rank),
        "image_recall_at_1": share(found_at <= 1, of=found_at),
        "image_recall_at_5": share(found_at <= 5, of=found_at),
        "image_map": mean(precision),
        "noise_confidence_p95": Statistic(
            (noise,), np.arange(len(noise)), partial(np.percentile, q=95), split="noise"
        ),
        "ood_auroc": told_apart(metrics.auroc),
        "ood_fpr95": told_apart(metrics.fpr95),
        "ood_accepted": Statistic((outputs.ood_accepted.ravel(),), alone, split="OOD", share=True),
        "in_domain_accepted": share(outputs.accepted, of=own),
        "same_answer": mean(outputs.same.mean(axis=0)),
        "embedding_stability": mean(outputs.cosine.mean(axis=0)),
        "prompt_consistency": mean(consistent),
    }
    # What no image can be judged by is left out.
    return {name: each for name, each in found.items() if not np.isnan(each.columns[0]).all()}


def _image_retrieval(outputs: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """As `metrics.image_retrieval`, (N,) each; an image asks those of its own fold."""
    exams, found = outputs.exams, np.full((2, len(outputs.labels)), np.nan)
    for number, embeds in enumerate(outputs.embeds):
        own = exams.round_of == number
        known = embeds[exams.asked[own]], outputs.labels[own], outputs.groups[own]
        found[:, own] = metrics.image_retrieval(*known)
    return found[0], found[1]


def compare(tuned: Outputs, base: Outputs, probes: Probes, domain: Domain) -> dict[str, Measure]:
    """Each measure of the fine-tuned model, with the base's, the probes', and what it gained.

    The better probe is better by the metric itself on these images: luck is on its side.
    `ece_of_perfect` is what the ECE would be by chance if the confidences were right: its mean, and
    the range of 95 % of draws.
    """
    of_base = clip_statistics(base, domain)
    of_probes = {name: statistics(probe, domain) for name, probe in probes.items()}
    measures = {}
    for name, statistic in clip_statistics(tuned, domain).items():
        others: dict[str, Any] = {}
        if name in of_base:
            others = {"base": of_base[name].measure(), "difference": statistic.minus(of_base[name])}
        rivals = {key: each[name].measure() for key, each in of_probes.items() if name in each}
        if rivals:
            better = min if name in LOWER_IS_BETTER else max
            best = better(rivals, key=lambda key: rivals[key].value)
            others |= rivals | {"to_probe": statistic.minus(of_probes[best][name])}
        measures[name] = replace(statistic.measure(), **others)
    draws = metrics.ece_of_perfect(tuned.confidence)
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    known = len(tuned.labels), tuned.exams.split
    measures["ece_of_perfect"] = Measure(float(draws.mean()), low, high, *known)
    if (folds := len(tuned.exams.rounds)) > 1:
        measures = {name: measure.widened(folds) for name, measure in measures.items()}
    return measures


def tables(tuned: Outputs, base: Outputs, domain: Domain) -> dict[str, Any]:
    """`classes`: what is known of each, None where there is nothing to judge.

    `ood`: of each kind of picture, the confidence in it, and how well each score notices it.
    `stability`: of each mild change, the cosine to the picture's own image_embeds, and how often
    the answer stays.
    """
    count = len(domain.classes)
    precision, recall, f1 = metrics.class_scores(tuned.predicted, tuned.labels, count)
    _, _, base_f1 = metrics.class_scores(base.predicted, base.labels, count)
    columns = {"n": np.bincount(tuned.labels, minlength=count), "precision": precision}
    columns |= {"recall": recall, "f1": f1, "base_f1": base_f1}
    table = pd.DataFrame(columns, index=domain.class_names, dtype=object)
    classes = table.where(table.notna(), None).to_dict("index")

    kinds: dict[str, Any] = {}
    for index, kind in enumerate(KINDS):
        scores = {name: each[index] for name, each in tuned.ood_scores.items()}
        accepted = tuned.ood_accepted[index]
        kinds[kind] = {
            "n": len(accepted),
            "confidence_mean": float(scores["confidence"].mean()),
            "confidence_p95": float(np.percentile(scores["confidence"], 95)),
            "accepted": float(accepted.mean()),
        }
        for name, values in scores.items():
            kinds[kind][f"auroc_{name}"] = metrics.auroc(tuned.own_scores[name], values)
            kinds[kind][f"fpr95_{name}"] = metrics.fpr95(tuned.own_scores[name], values)

    stability = {
        name: {
            "n": int(np.isfinite(same).sum()),
            "cosine": float(np.nanmean(cosine)),
            "same_answer": float(np.nanmean(same)),
        }
        for name, cosine, same in zip(CHANGES, tuned.cosine, tuned.same, strict=True)
    }
    return {"classes": classes, "ood": kinds, "stability": stability}


def scorecard_text(measures: dict[str, Measure], gates: dict[str, Verdict], tuned: Outputs) -> str:
    """All measures, those with a gate first, then temperature, abstention and OOD threshold."""
    rows = []
    for name in [*gates, *(name for name in METRIC_TITLES if name in measures.keys() - gates)]:
        found = measures[name]
        rivals = found.base, found.probe, found.strong_probe
        others = [f"{each.value:.3f}" if each else "" for each in rivals]
        gains = [_signed(found.difference), _signed(found.to_probe)]
        row = [METRIC_TITLES[name], *others, str(found), *gains, str(gates.get(name, ""))]
        rows.append([*row, f"{found.n} {found.split}"])
    header = "metric|base|probe|strong probe|fine-tuned [95 % interval]|to base|to probe|gate|n"
    fit, abstention = tuned.fitted["temperature_fit"], tuned.fitted["abstention"]
    aim = "reached" if abstention["target_reached"] else "not reached, so the best at half coverage"
    score, threshold, aurocs = (tuned.ood[name] for name in ("score", "threshold", "auroc"))
    told = ", ".join(f"{name} {value:.3f}" for name, value in aurocs.items()).replace("_", " ")
    warning = f"warning: {fit['warning']}\n" if fit["warning"] else ""
    return (
        f"{format_table(header.split('|'), rows)}\n"
        "probe: logistic regression on the base's image_embeds; strong probe: LDA or logistic "
        "regression on its pooled features; to probe: to the better of them; ?: the interval of "
        "the paired difference holds 0\n"
        f"\ntemperature {fit['value']:.3f} [{fit['low']:.3f}, {fit['high']:.3f}]; below a "
        f"confidence of {abstention['threshold']:.2f} the answer is 'not sure' (aim: "
        f"{abstention['aim'].replace('_', ' ')} of {abstention['target']:.0%}, {aim} on "
        f"calibration)\n{warning}"
        f"outside of the domain: {score.replace('_', ' ')} below {threshold:.3f} (AUROC on "
        f"calibration: {told})"
    )


def _signed(difference: Measure | None) -> str:
    if difference is None:
        return ""
    return f"{difference.value:+.3f}{' ?' if difference.low <= 0 <= difference.high else ''}"
