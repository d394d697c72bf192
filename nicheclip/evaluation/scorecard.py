"""What a model is worth on the test split, beside the base model and a linear probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import log_softmax

from nicheclip.domain import Domain
from nicheclip.evaluation import metrics
from nicheclip.evaluation.intervals import Measure, bootstrap, proportion
from nicheclip.evaluation.predictions import Outputs, Predictions
from nicheclip.evaluation.robustness import prompt_answers


@dataclass(frozen=True)
class Statistic:
    """A number about images, and how to find its interval.

    Args:
        compute: takes the indices of images (M,) int.
        groups: (N,) near-duplicate group of each image.
        values: (N,) of which it is the mean, NaN where an image is not judged.
        share: whether the values are hits, 0 or 1.
        biased: as in `bootstrap`.
    """

    compute: Callable[[np.ndarray], float]
    groups: np.ndarray
    split: str
    values: np.ndarray | None = None
    share: bool = False
    biased: bool = False

    def measure(self) -> Measure:
        """The value on all images that are judged, with its interval."""
        if self.values is None:
            return bootstrap(self.compute, self.groups, self.split, self.biased)
        judged = np.flatnonzero(np.isfinite(self.values))
        if self.share:
            return proportion(self.values[judged] > 0, self.groups[judged], self.split)
        return bootstrap(
            lambda chosen: self.compute(judged[chosen]),
            self.groups[judged],
            self.split,
            self.biased,
        )

    def minus(self, other: Statistic) -> Measure:
        """The difference on the same images, with the interval of the paired difference."""
        return bootstrap(
            lambda chosen: self.compute(chosen) - other.compute(chosen), self.groups, self.split
        )


def statistics(
    answers: Predictions, labels: np.ndarray, groups: np.ndarray, domain: Domain
) -> dict[str, Statistic]:
    """Those that any classifier has.

    Args:
        labels: (N,) int, of the test images.
        groups: (N,) their near-duplicate groups.
    """
    calibrated, count = answers.calibrated, len(domain.classes)
    predicted, confidence = calibrated.argmax(axis=1), calibrated.max(axis=1)
    right = predicted == labels
    answered = confidence >= answers.fitted.abstention.threshold
    own = np.arange(len(labels)), labels
    losses = -log_softmax(answers.logits, axis=1)[own]  # finite where p underflows
    covered = answers.sets[own]

    def of_classes(metric: Callable[..., float], biased: bool = False) -> Statistic:
        def compute(chosen: np.ndarray) -> float:
            return metric(predicted[chosen], labels[chosen], count)

        return Statistic(compute, groups, "test", biased=biased)

    def ece(confidence: np.ndarray, equal_mass: bool = False) -> Statistic:
        def compute(chosen: np.ndarray) -> float:
            return metrics.expected_calibration_error(
                confidence[chosen], right[chosen], equal_mass=equal_mass
            )

        return Statistic(compute, groups, "test", biased=True)

    def worst_coverage(chosen: np.ndarray) -> float:
        of_class = np.bincount(labels[chosen], minlength=count)
        hits = np.bincount(labels[chosen], covered[chosen], count)
        return float((hits[of_class > 0] / of_class[of_class > 0]).min())

    return {
        "accuracy": mean(right, groups, share=True),
        "balanced_accuracy": of_classes(metrics.balanced_accuracy),
        "macro_f1": of_classes(metrics.macro_f1),
        "worst_class_f1": of_classes(metrics.worst_f1, biased=True),
        "top_3_accuracy": mean(metrics.top_k_correct(calibrated, labels, 3), groups, share=True),
        "ece_before_calibration": ece(answers.raw.max(axis=1)),
        "ece": ece(confidence),
        "ece_equal_mass": ece(confidence, equal_mass=True),
        "nll": mean(losses, groups),
        "brier": mean(metrics.brier(calibrated, labels), groups),
        "aurc": Statistic(
            lambda chosen: metrics.aurc(confidence[chosen], right[chosen]), groups, "test"
        ),
        "coverage": mean(answered, groups, share=True),
        "selective_accuracy": mean(np.where(answered, right, np.nan), groups, share=True),
        "conformal_coverage": mean(covered, groups, share=True),
        "conformal_worst_class": Statistic(worst_coverage, groups, "test", biased=True),
        "conformal_set_size": mean(answers.sets.sum(axis=1), groups),
    }


def clip_statistics(
    outputs: Outputs, labels: np.ndarray, groups: np.ndarray, domain: Domain
) -> dict[str, Statistic]:
    """`statistics`, and those that need image_embeds and prompts."""
    similarity, prompt_classes = outputs.similarity, outputs.prompt_classes
    clusters = np.array(domain.class_clusters)
    margin = metrics.hard_negative_margin(similarity, prompt_classes, labels, clusters)
    rank = metrics.semantic_rank(similarity, prompt_classes, labels)
    found_at, precision = metrics.image_retrieval(outputs.image_embeds, labels, groups)
    first, *others = prompt_answers(similarity, prompt_classes).T
    consistent = np.mean([each == first for each in others] or [np.full(len(labels), np.nan)], 0)
    cosines, same = zip(*outputs.changed.values(), strict=True)
    noise = outputs.ood_scores["noise"]["confidence"]
    score, threshold = outputs.ood.score, outputs.ood.threshold
    own = outputs.own_scores[score]
    outside = np.concatenate([scores[score] for scores in outputs.ood_scores.values()])
    both, number = np.concatenate([own, outside]), len(own)
    groups_of_both = np.concatenate(
        [np.unique(groups, return_inverse=True)[1], number + np.arange(len(outside))]
    )

    def where(judged: np.ndarray, hits: np.ndarray) -> Statistic:
        return mean(np.where(np.isfinite(judged), hits, np.nan), groups, share=True)

    def told_apart(metric: Callable[[np.ndarray, np.ndarray], float]) -> Statistic:
        def compute(chosen: np.ndarray) -> float:
            return metric(both[chosen[chosen < number]], both[chosen[chosen >= number]])

        return Statistic(compute, groups_of_both, "test and OOD")

    found = statistics(outputs, labels, groups, domain) | {
        "hard_negative_pass_rate": where(margin, margin > 0),
        "hard_negative_margin": mean(margin, groups),
        "semantic_recall_at_1": mean(rank <= 1, groups, share=True),
        "semantic_recall_at_3": mean(rank <= 3, groups, share=True),
        "semantic_recall_at_5": mean(rank <= 5, groups, share=True),
        "semantic_mrr": mean(1 / rank, groups),
        "image_recall_at_1": where(found_at, found_at <= 1),
        "image_recall_at_5": where(found_at, found_at <= 5),
        "image_map": mean(precision, groups),
        "noise_confidence_p95": Statistic(
            lambda chosen: float(np.percentile(noise[chosen], 95)), np.arange(len(noise)), "noise"
        ),
        "ood_auroc": told_apart(metrics.auroc),
        "ood_fpr95": told_apart(metrics.fpr95),
        "ood_accepted": mean(outside >= threshold, np.arange(len(outside)), "OOD", share=True),
        "in_domain_accepted": mean(own >= threshold, groups, share=True),
        "same_answer": mean(np.mean(same, axis=0), groups),
        "embedding_stability": mean(np.mean(cosines, axis=0), groups),
        "prompt_consistency": mean(consistent, groups),
    }
    return {
        name: each
        for name, each in found.items()
        if each.values is None or np.isfinite(each.values).any()
    }


def mean(
    values: np.ndarray, groups: np.ndarray, split: str = "test", share: bool = False
) -> Statistic:
    """The mean of values (N,); images where it is NaN are not judged."""
    values = values.astype(float)
    return Statistic(lambda chosen: float(np.nanmean(values[chosen])), groups, split, values, share)


def compare(
    tuned: dict[str, Statistic], base: dict[str, Statistic], probe: dict[str, Statistic]
) -> dict[str, Measure]:
    """Each measure of the fine-tuned model, with the base's, the probe's, and what it gained."""
    return {
        name: replace(
            statistic.measure(),
            base=base[name].measure() if name in base else None,
            probe=probe[name].measure() if name in probe else None,
            difference=statistic.minus(base[name]) if name in base else None,
        )
        for name, statistic in tuned.items()
    }


def perfect_ece(answers: Predictions) -> Measure:
    """What the ECE would be by chance if the confidences were right: mean, range of 95 %."""
    draws = metrics.ece_of_perfect(answers.calibrated.max(axis=1))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Measure(float(draws.mean()), float(low), float(high), len(answers.logits), "test")


def class_table(
    tuned: Outputs, base: Outputs, labels: np.ndarray, domain: Domain
) -> dict[str, dict[str, float | None]]:
    """Each class: test images, precision, recall, F1, the base's F1; None: nothing to judge."""
    count = len(domain.classes)
    precision, recall, f1 = metrics.class_scores(tuned.calibrated.argmax(axis=1), labels, count)
    _, _, base_f1 = metrics.class_scores(base.calibrated.argmax(axis=1), labels, count)
    columns = {"precision": precision, "recall": recall, "f1": f1, "base_f1": base_f1}
    table: dict[str, dict[str, float | None]] = {}
    for index, name in enumerate(domain.class_names):
        table[name] = {"n": int((labels == index).sum())}
        for title, column in columns.items():
            table[name][title] = None if np.isnan(column[index]) else float(column[index])
    return table


def ood_table(outputs: Outputs) -> dict[str, dict[str, Any]]:
    """Each kind of OOD picture: the confidence in it, and how well each score notices it."""
    chosen, table = outputs.ood.score, {}
    for kind, scores in outputs.ood_scores.items():
        table[kind] = {
            "n": len(scores[chosen]),
            "confidence_mean": float(scores["confidence"].mean()),
            "confidence_p95": float(np.percentile(scores["confidence"], 95)),
            "accepted": float((scores[chosen] >= outputs.ood.threshold).mean()),
        }
        for title, metric in (("auroc", metrics.auroc), ("fpr95", metrics.fpr95)):
            for name, values in scores.items():
                table[kind][f"{title}_{name}"] = metric(outputs.own_scores[name], values)
    return table


def stability_table(outputs: Outputs) -> dict[str, dict[str, float]]:
    """Each mild change: mean cosine to the picture's own embedding, how often the answer stays."""
    return {
        name: {
            "n": int(np.isfinite(same).sum()),
            "cosine": float(np.nanmean(cosine)),
            "same_answer": float(np.nanmean(same)),
        }
        for name, (cosine, same) in outputs.changed.items()
    }
