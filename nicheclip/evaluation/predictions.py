"""What a model answers: a CLIPModel as a classifier, fitted on the calibration split and run on the test split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from scipy.special import softmax
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import encode_images, encode_texts, image_side, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.evaluation.calibration import (
    Abstention,
    Conformal,
    Objective,
    Temperature,
    calibrate_temperature,
    fit_abstention,
    fit_conformal,
    nll,
    prediction_sets,
)
from nicheclip.evaluation.ood import (
    KINDS,
    PER_KIND,
    OODThreshold,
    Score,
    domain_scores,
    fit_class_means,
    fit_ood_threshold,
    ood_pictures,
)
from nicheclip.evaluation.robustness import CHANGES

CHANGED_IMAGES = 300  # of a split, on which stability is measured


class DomainClassifier:
    """A CLIPModel as the zero-shot classifier of a domain: its canonical prompts are the classes."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, domain: Domain, title: str):
        self.model = model
        self.processor = processor
        self.title = title
        self.prototypes = encode_texts(model, processor, domain.canonical_prompts)  # (C, D)
        prompts, prompt_classes = domain.prompt_bank
        self.prompt_embeds = encode_texts(model, processor, prompts).cpu().numpy()  # (P, D)
        self.prompt_classes = np.array(prompt_classes)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by, no logarithm."""
        return self.model.logit_scale.exp().item()

    def embed(self, images: Iterable[Image.Image], total: int, what: str) -> np.ndarray:
        """Unit-length image_embeds (N, D)."""
        return encode_images(
            self.model, self.processor, images, total, description=f"{what}, {self.title}"
        )

    def embed_rows(self, rows: Dataset, what: str) -> np.ndarray:
        """`embed` of a split."""
        return self.embed((row["image"] for row in rows), len(rows), what)

    def embed_ood(self, own: Dataset, seed: int) -> dict[str, np.ndarray]:
        """image_embeds (M, D) of OOD pictures by kind; some are made of pictures of a split."""
        side = image_side(self.processor)
        pictures = [row["image"] for row in own.select(range(min(PER_KIND, len(own))))]
        drawn = chain.from_iterable(ood_pictures(kind, side, seed, pictures) for kind in KINDS)
        embeds = self.embed(drawn, PER_KIND * len(KINDS), "OOD pictures")
        return dict(zip(KINDS, np.split(embeds, len(KINDS)), strict=True))

    def logits(self, image_embeds: np.ndarray) -> np.ndarray:
        """Uncalibrated logits: (N, D) -> (N, C)."""
        return zero_shot_logits(self.model, image_embeds, self.prototypes)


@dataclass(frozen=True)
class Fitted:
    """What the calibration split decides."""

    temperature: Temperature
    abstention: Abstention
    conformal: Conformal
    nll_before: float
    nll_after: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the temperature is a number there, what is known of it lies beside."""
        fields = asdict(self)
        return fields | {
            "temperature": self.temperature.value,
            "temperature_fit": fields["temperature"],
        }


def fit(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    domain: Domain,
    objective: Objective = "nll",
    reference: bool = False,
) -> Fitted:
    """From uncalibrated logits (N, C), labels (N,) and near-duplicate groups (N,) of the calibration split.

    Args:
        reference: only measured beside another model: if all images are wrong, its temperature
            stays 1.

    Raises:
        ValueError: if all images are wrong.
    """
    try:
        temperature = calibrate_temperature(logits, labels, groups, objective)
    except ValueError as error:
        if not reference:
            raise
        temperature = Temperature(1.0, 1.0, 1.0, objective, str(error))
    scaled = logits / temperature.value
    probabilities = softmax(scaled, axis=1)
    return Fitted(
        temperature,
        fit_abstention(probabilities, labels, domain.selective_accuracy, domain.answered_share),
        fit_conformal(probabilities, labels, domain.conformal_coverage),
        nll(logits, labels),
        nll(scaled, labels),
    )


@dataclass(frozen=True)
class Predictions:
    """What a classifier says about the N images of a split."""

    logits: np.ndarray  # (N, C) uncalibrated
    fitted: Fitted

    @cached_property
    def raw(self) -> np.ndarray:
        """(N, C) probabilities before calibration."""
        return softmax(self.logits, axis=1)

    @cached_property
    def calibrated(self) -> np.ndarray:
        """(N, C) probabilities."""
        return softmax(self.logits / self.fitted.temperature.value, axis=1)

    @cached_property
    def sets(self) -> np.ndarray:
        """(N, C) bool, the prediction sets."""
        return prediction_sets(self.calibrated, self.fitted.conformal)


@dataclass(frozen=True)
class Outputs(Predictions):
    """What a CLIPModel says about the N images of a split, and about pictures that are none of them."""

    log_logit_scale: float  # as the model has learned it
    calibration_embeds: np.ndarray  # (K, D) of the calibration split
    class_means: dict[str, np.ndarray]  # of the training images, see `fit_class_means`
    image_embeds: np.ndarray  # (N, D)
    similarity: np.ndarray  # (N, P) cosine with every prompt of the bank
    prompt_classes: np.ndarray  # (P,)
    ood: OODThreshold
    own_scores: dict[Score, np.ndarray]  # of the images (N,), by score
    # of OOD pictures (M,), by kind and score
    ood_scores: dict[str, dict[Score, np.ndarray]]
    # cosine and whether the answer stays, (N,), NaN: not tried
    changed: dict[str, tuple[np.ndarray, np.ndarray]]


def fit_and_run(
    classifier: DomainClassifier,
    splits: dict[str, Dataset],
    train_embeds: np.ndarray,
    domain: Domain,
    objective: Objective = "nll",
    reference: bool = False,
) -> Outputs:
    """Fits a classifier on the calibration split and runs it on the test split.

    Args:
        train_embeds: (M, D) of the train split.
        reference: as in `fit`.

    Raises:
        ValueError: if all calibration images are wrong.
    """
    calibration, test = splits["calibration"], splits["test"]
    class_means = fit_class_means(train_embeds, np.array(splits["train"]["label"]))

    embeds = classifier.embed_rows(calibration, "calibration split")
    logits = classifier.logits(embeds)
    fitted = fit(
        logits,
        np.array(calibration["label"]),
        np.array(calibration["group_id"]),
        domain,
        objective,
        reference,
    )

    def scores(image_embeds: np.ndarray) -> dict[Score, np.ndarray]:
        temperature = fitted.temperature.value
        scaled = classifier.logits(image_embeds) / temperature
        return domain_scores(
            image_embeds, scaled, classifier.logit_scale / temperature, class_means
        )

    # Other OOD pictures choose the score than those that the scorecard is made of.
    strange = scores(np.concatenate(list(classifier.embed_ood(calibration, seed=1).values())))
    image_embeds = classifier.embed_rows(test, "test split")
    return Outputs(
        classifier.logits(image_embeds),
        fitted,
        classifier.model.logit_scale.item(),
        embeds,
        class_means,
        image_embeds,
        image_embeds @ classifier.prompt_embeds.T,
        classifier.prompt_classes,
        fit_ood_threshold(scores(embeds), strange),
        scores(image_embeds),
        {kind: scores(of_kind) for kind, of_kind in classifier.embed_ood(test, seed=0).items()},
        _changed(classifier, test, image_embeds),
    )


def _changed(
    classifier: DomainClassifier, test: Dataset, image_embeds: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    tried = np.unique(np.linspace(0, len(test) - 1, CHANGED_IMAGES).astype(int))
    own, answers = image_embeds[tried], classifier.logits(image_embeds[tried]).argmax(axis=1)
    pictures = (
        change(row["image"].convert("RGB"))
        for change in CHANGES.values()
        for row in test.select(tried)
    )
    embeds = classifier.embed(pictures, len(CHANGES) * len(tried), "mild changes")
    found = {}
    for name, changed in zip(CHANGES, np.split(embeds, len(CHANGES)), strict=True):
        cosine, same = np.full(len(test), np.nan), np.full(len(test), np.nan)
        cosine[tried] = (changed * own).sum(axis=1)
        same[tried] = classifier.logits(changed).argmax(axis=1) == answers
        found[name] = cosine, same
    return found
