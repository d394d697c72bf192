"""What a model is worth: all metrics of one model on one split, beside the base model's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from PIL import Image
from scipy.special import log_softmax, softmax
from transformers import CLIPModel, CLIPProcessor

from nicheclip import metrics
from nicheclip.calibration import Abstention, fit_abstention, fit_temperature, nll
from nicheclip.data import image_side
from nicheclip.domain import Domain
from nicheclip.results import Measure, bootstrap, gate_target, gate_verdict, proportion
from nicheclip.zero_shot import encode_images, encode_texts, zero_shot_logits

NOISE_IMAGES = 200


class DomainClassifier:
    """A CLIPModel as the zero-shot classifier of a domain: its canonical prompts are the classes.

    `fit` gives it a temperature and an abstention threshold of its own.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, domain: Domain):
        self.model = model
        self.processor = processor
        self.domain = domain
        self.prototypes = encode_texts(model, processor, domain.canonical_prompts)  # (C, D)
        prompts, prompt_classes = domain.prompt_bank
        self.prompt_embeds = encode_texts(model, processor, prompts).cpu().numpy()  # (P, D)
        self.prompt_classes = np.array(prompt_classes)

    def embed(self, images: Iterable[Image.Image], total: int, description: str) -> np.ndarray:
        """Unit-length image_embeds (N, D)."""
        return encode_images(self.model, self.processor, images, total, description=description)

    def logits(self, image_embeds: np.ndarray) -> np.ndarray:
        """Uncalibrated logits: (N, D) -> (N, C)."""
        return zero_shot_logits(self.model, image_embeds, self.prototypes)

    def fit(self, calibration: Dataset, description: str, reference: bool = False) -> dict[str, float]:
        """Fits temperature and abstention on the calibration split; gives the NLL before and after.

        Args:
            reference: only measured beside another model: if the images can't identify its temperature, it keeps 1.

        Raises:
            ValueError: if the images can't identify a temperature.
        """
        logits = self.logits(self.embed((row["image"] for row in calibration), len(calibration), description))
        labels = np.array(calibration["label"])
        try:
            self.temperature = fit_temperature(logits, labels)
        except ValueError:
            if not reference:
                raise
            self.temperature = 1.0
        self.abstention: Abstention = fit_abstention(logits, labels, self.temperature, self.domain.selective_accuracy)
        return {"nll_before": nll(logits, labels), "nll_after": nll(logits / self.temperature, labels)}

    def noise_confidence(self) -> np.ndarray:
        """The calibrated confidence on `NOISE_IMAGES` images of uniform noise, (M,); always the same noise."""
        rng = np.random.default_rng(0)
        side = image_side(self.processor)
        noise = (Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(NOISE_IMAGES))
        logits = self.logits(self.embed(noise, NOISE_IMAGES, "noise"))
        return softmax(logits / self.temperature, axis=1).max(axis=1)


@dataclass(frozen=True)
class Outputs:
    """What a classifier said about a split of N images, C classes, P prompts."""

    image_embeds: np.ndarray  # (N, D)
    similarity: np.ndarray  # (N, P) cosine with every prompt of the bank
    raw: np.ndarray  # (N, C) probabilities before calibration
    calibrated: np.ndarray  # (N, C)
    log_calibrated: np.ndarray  # (N, C) its logarithm, finite where the probability underflows
    noise: np.ndarray  # (M,) calibrated confidence on noise
    threshold: float  # of abstention


def run_classifier(classifier: DomainClassifier, rows: Dataset, description: str) -> Outputs:
    """Encodes each image once."""
    image_embeds = classifier.embed((row["image"] for row in rows), len(rows), description)
    logits = classifier.logits(image_embeds)
    return Outputs(
        image_embeds,
        image_embeds @ classifier.prompt_embeds.T,
        softmax(logits, axis=1),
        softmax(logits / classifier.temperature, axis=1),
        log_softmax(logits / classifier.temperature, axis=1),
        classifier.noise_confidence(),
        classifier.abstention.threshold,
    )


def measure(
    outputs: Outputs, labels: np.ndarray, groups: np.ndarray, domain: Domain, split: str
) -> dict[str, Measure]:
    """Every metric of the scorecard with its interval.

    Args:
        labels: (N,) int.
        groups: (N,) near-duplicate group of each image; bootstrap intervals resample groups.
    """
    calibrated, raw = outputs.calibrated, outputs.raw
    prompt_classes = np.array(domain.prompt_bank[1])
    margin = metrics.hard_negative_margin(outputs.similarity, prompt_classes, labels, np.array(domain.class_clusters))
    rank = metrics.semantic_rank(outputs.similarity, prompt_classes, labels)
    right = metrics.correct(calibrated, labels)
    answered = calibrated.max(axis=1) >= outputs.threshold
    losses = -outputs.log_calibrated[np.arange(len(labels)), labels]

    measures = {
        "accuracy": proportion(right, groups, split),
        "macro_f1": bootstrap(lambda chosen: metrics.macro_f1(calibrated[chosen], labels[chosen]), groups, split),
        "semantic_recall_at_1": proportion(rank <= 1, groups, split),
        "semantic_recall_at_3": proportion(rank <= 3, groups, split),
        "semantic_recall_at_5": proportion(rank <= 5, groups, split),
        "semantic_mrr": bootstrap(lambda chosen: (1 / rank[chosen]).mean(), groups, split),
        "ece_before_calibration": bootstrap(
            lambda chosen: metrics.expected_calibration_error(raw[chosen], labels[chosen]), groups, split, biased=True
        ),
        "ece": bootstrap(
            lambda chosen: metrics.expected_calibration_error(calibrated[chosen], labels[chosen]),
            groups,
            split,
            biased=True,
        ),
        "nll": bootstrap(lambda chosen: losses[chosen].mean(), groups, split),
        "coverage": proportion(answered, groups, split),
        "noise_confidence_p95": bootstrap(
            lambda chosen: np.percentile(outputs.noise[chosen], 95), np.arange(len(outputs.noise)), "noise"
        ),
    }
    judged = np.isfinite(margin)
    if judged.any():  # else no class shares its cluster with another
        measures["hard_negative_pass_rate"] = proportion(margin[judged] > 0, groups[judged], split)
    if answered.any():
        measures["selective_accuracy"] = proportion(right[answered], groups[answered], split)
    return measures


def beside_base(tuned: dict[str, Measure], base: dict[str, Measure]) -> dict[str, Measure]:
    """Each measure of the fine-tuned model with the base model's beside it."""
    return {name: replace(measure, base=base.get(name)) for name, measure in tuned.items()}


def judge(measures: dict[str, Measure], domain: Domain) -> dict[str, dict[str, str]]:
    """The gates of the domain: {metric: {"target", "verdict"}}."""
    return {
        name: {"target": gate_target(name, target), "verdict": gate_verdict(name, measures[name].value, target)}
        for name, target in domain.gates.items()
    }
