"""What a model is worth: all metrics of one model on the test split, beside the base model's and a linear probe's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    """Those that any classifier has, from its answers to the test split, labels (N,) and groups (N,)."""
    calibrated, count = answers.calibrated, len(domain.classes)
    predicted, confidence = calibrated.argmax(axis=1), calibrated.max(axis=1)
    right, raw_confidence = predicted == labels, answers.raw.max(axis=1)
    answered = confidence >= answers.fitted.abstention.threshold
    own = np.arange(len(labels)), labels
    # finite where p underflows
    losses = -log_softmax(answers.logits / answers.fitted.temperature.value, axis=1)[own]
    covered = answers.sets[own]

    def worst_class(hits: np.ndarray) -> Callable[[np.ndarray], float]:
        def compute(chosen: np.ndarray) -> float:
            of_class = np.bincount(labels[chosen], minlength=count)
            return float(
                (
                    np.bincount(labels[chosen], hits[chosen], count)[of_class > 0]
                    / of_class[of_class > 0]
                ).min()
            )

        return compute

    def of(compute: Callable[[np.ndarray], float], biased: bool = False) -> Statistic:
        return Statistic(compute, groups, "test", biased=biased)

    def ece(confidence: np.ndarray, **options: bool) -> Statistic:
        return of(
            lambda chosen: metrics.expected_calibration_error(
                confidence[chosen], right[chosen], **options
            ),
            True,
        )

    return {
        "accuracy": mean(right, groups, share=True),
        "balanced_accuracy": of(
            lambda chosen: metrics.balanced_accuracy(predicted[chosen], labels[chosen], count)
        ),
        "macro_f1": of(lambda chosen: metrics.macro_f1(predicted[chosen], labels[chosen], count)),
        "worst_class_f1": of(
            lambda chosen: float(
                np.nanmin(metrics.class_scores(predicted[chosen], labels[chosen], count)[2])
            ),
            True,
        ),
        "top_3_accuracy": mean(metrics.top_k_correct(calibrated, labels, 3), groups, share=True),
        "ece_before_calibration": ece(raw_confidence),
        "ece": ece(confidence),
        "ece_equal_mass": ece(confidence, equal_mass=True),
        "nll": mean(losses, groups),
        "brier": mean(metrics.brier(calibrated, labels), groups),
        "aurc": of(lambda chosen: metrics.aurc(confidence[chosen], right[chosen])),
        "coverage": mean(answered, groups, share=True),
        "selective_accuracy": mean(np.where(answered, right, np.nan), groups, share=True),
        "conformal_coverage": mean(covered, groups, share=True),
        "conformal_worst_class": of(worst_class(covered), True),
        "conformal_set_size": mean(answers.sets.sum(axis=1), groups),
    }


def clip_statistics(
    outputs: Outputs, labels: np.ndarray, groups: np.ndarray, domain: Domain
) -> dict[str, Statistic]:
    """`statistics`, and those that need image_embeds and prompts."""
    margin = metrics.hard_negative_margin(
        outputs.similarity, outputs.prompt_classes, labels, np.array(domain.class_clusters)
    )
    rank = metrics.semantic_rank(outputs.similarity, outputs.prompt_classes, labels)
    found_at, precision = metrics.image_retrieval(outputs.image_embeds, labels, groups)
    with_prompts = prompt_answers(outputs.similarity, outputs.prompt_classes)  # (N, K)
    consistent = (
        (with_prompts[:, 1:] == with_prompts[:, :1]).mean(axis=1)
        if with_prompts.shape[1] > 1
        else np.full(len(labels), np.nan)
    )
    noise = outputs.ood_scores["noise"]["confidence"]
    score, threshold = outputs.ood.score, outputs.ood.threshold
    own, strange = (
        outputs.own_scores[score],
        np.concatenate([kind[score] for kind in outputs.ood_scores.values()]),
    )
    scores, number = np.concatenate([own, strange]), len(own)
    groups_of_both = np.concatenate(
        [np.unique(groups, return_inverse=True)[1], number + np.arange(len(strange))]
    )

    def within(ranks: np.ndarray, k: int) -> np.ndarray:
        return np.where(np.isfinite(ranks), ranks <= k, np.nan)

    def told_apart(metric: Callable[[np.ndarray, np.ndarray], float]) -> Statistic:
        def compute(chosen: np.ndarray) -> float:
            return metric(scores[chosen[chosen < number]], scores[chosen[chosen >= number]])

        return Statistic(compute, groups_of_both, "test and OOD")

    found = statistics(outputs, labels, groups, domain) | {
        "hard_negative_pass_rate": mean(
            np.where(np.isfinite(margin), margin > 0, np.nan), groups, share=True
        ),
        "hard_negative_margin": mean(margin, groups),
        "semantic_recall_at_1": mean(rank <= 1, groups, share=True),
        "semantic_recall_at_3": mean(rank <= 3, groups, share=True),
        "semantic_recall_at_5": mean(rank <= 5, groups, share=True),
        "semantic_mrr": mean(1 / rank, groups),
        "image_recall_at_1": mean(within(found_at, 1), groups, share=True),
        "image_recall_at_5": mean(within(found_at, 5), groups, share=True),
        "image_map": mean(precision, groups),
        "noise_confidence_p95": Statistic(
            lambda chosen: float(np.percentile(noise[chosen], 95)), np.arange(len(noise)), "noise"
        ),
        "ood_auroc": told_apart(metrics.auroc),
        "ood_fpr95": told_apart(metrics.fpr95),
        "ood_accepted": mean(strange >= threshold, np.arange(len(strange)), "OOD", share=True),
        "in_domain_accepted": mean(own >= threshold, groups, share=True),
        "same_answer": mean(
            np.mean([same for _, same in outputs.changed.values()], axis=0), groups
        ),
        "embedding_stability": mean(
            np.mean([cosine for cosine, _ in outputs.changed.values()], axis=0), groups
        ),
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
    """Each measure of the fine-tuned model, with those of the base model and of the probe, and what it gained."""
    measures = {}
    for name, statistic in tuned.items():
        measures[name] = replace(
            statistic.measure(),
            base=base[name].measure() if name in base else None,
            probe=probe[name].measure() if name in probe else None,
            difference=statistic.minus(base[name]) if name in base else None,
        )
    return measures


def perfect_ece(answers: Predictions) -> Measure:
    """What the ECE would be by chance if the confidences were right: its mean and the range of 95 % of draws."""
    draws = metrics.ece_of_perfect(answers.calibrated.max(axis=1))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Measure(float(draws.mean()), float(low), float(high), len(answers.logits), "test")


def class_table(
    tuned: Outputs, base: Outputs, labels: np.ndarray, domain: Domain
) -> dict[str, dict[str, float | None]]:
    """Each class: its test images, precision, recall, F1, and the base's F1.

    None where there is nothing to judge.
    """
    count = len(domain.classes)
    precision, recall, f1 = metrics.class_scores(tuned.calibrated.argmax(axis=1), labels, count)
    _, _, base_f1 = metrics.class_scores(base.calibrated.argmax(axis=1), labels, count)
    columns = {"precision": precision, "recall": recall, "f1": f1, "base_f1": base_f1}
    return {
        name: {"n": int((labels == index).sum())}
        | {
            title: None if np.isnan(column[index]) else float(column[index])
            for title, column in columns.items()
        }
        for index, name in enumerate(domain.class_names)
    }


def ood_table(outputs: Outputs) -> dict[str, dict[str, float]]:
    """Each kind of OOD picture: how confident the model is, and how well each score tells it from test images."""
    threshold, chosen = outputs.ood.threshold, outputs.ood.score
    return {
        kind: {
            "n": len(scores[chosen]),
            "confidence_mean": float(scores["confidence"].mean()),
            "confidence_p95": float(np.percentile(scores["confidence"], 95)),
            "accepted": float((scores[chosen] >= threshold).mean()),
        }
        | {
            f"auroc_{name}": metrics.auroc(outputs.own_scores[name], scores[name])
            for name in scores
        }
        | {
            f"fpr95_{name}": metrics.fpr95(outputs.own_scores[name], scores[name])
            for name in scores
        }
        for kind, scores in outputs.ood_scores.items()
    }


def stability_table(outputs: Outputs) -> dict[str, dict[str, float]]:
    """Each mild change: the mean cosine to the picture's own image_embeds, and how often the answer stays."""
    return {
        name: {
            "n": int(np.isfinite(same).sum()),
            "cosine": float(np.nanmean(cosine)),
            "same_answer": float(np.nanmean(same)),
        }
        for name, (cosine, same) in outputs.changed.items()
    }
