"""What a model says: its head fitted on the calibration split, and run on the test split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import encode_images, encode_texts, image_side
from nicheclip.domain import Domain
from nicheclip.evaluation.calibration import fit
from nicheclip.evaluation.ood import (
    KINDS,
    PER_KIND,
    OODThreshold,
    fit_class_means,
    fit_ood_threshold,
    ood_pictures,
)
from nicheclip.evaluation.probe import fit_probe
from nicheclip.evaluation.robustness import CHANGES
from nicheclip.files import quiet_datasets, replaced_file
from nicheclip.head import Head, prediction_sets, softmax

CHANGED_IMAGES = 300  # of a split, on which stability is measured


@dataclass(frozen=True)
class Predictions:
    """What a calibrated head says about the N images of the test split.

    Attributes:
        fitted: what `fit` says of the head.
        embeds: image_embeds of each split, (N, D).
        labels, groups: (N,) int, and the near-duplicate groups.
        logits, calibrated, raw: (N, C), the logits and probabilities; raw: before calibration.
        predicted, confidence, right: (N,) the most probable class, its probability, and whether it
            is the label.
        sets: (N, C) bool, the prediction sets.
    """

    head: Head
    fitted: dict[str, Any]
    embeds: dict[str, np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    logits: np.ndarray
    calibrated: np.ndarray
    raw: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    sets: np.ndarray


def predict(
    head: Head,
    embeds: dict[str, np.ndarray],
    splits: dict[str, Dataset],
    domain: Domain,
    reference: bool = False,
) -> Predictions:
    """Fits a head on the calibration split and asks it about the test split.

    Args:
        embeds: image_embeds (N, D) of each split.
        reference: as in `calibrate_temperature`.

    Raises:
        ValueError: if all calibration images are wrong.
    """
    known, (labels, groups) = (
        (np.array(splits[name]["label"]), np.array(splits[name]["group_id"]))
        for name in ("calibration", "test")
    )
    fitted_head, fitted = fit(head, embeds["calibration"], *known, domain, reference)
    logits, raw = (each.logits(embeds["test"]) for each in (fitted_head, head))
    calibrated = softmax(logits)
    predicted = calibrated.argmax(axis=1)
    return Predictions(
        head=fitted_head,
        fitted=fitted,
        embeds=embeds,
        labels=labels,
        groups=groups,
        logits=logits,
        calibrated=calibrated,
        raw=softmax(raw),
        predicted=predicted,
        confidence=calibrated.max(axis=1),
        right=predicted == labels,
        sets=prediction_sets(calibrated, fitted["conformal"]["quantile"]),
    )


@dataclass(frozen=True)
class Outputs(Predictions):
    """What a CLIPModel says about the images of test, and about pictures that are none of them.

    Attributes:
        similarity: (N, P) cosine with every prompt of the bank, of the classes `prompt_classes`.
        own_scores: of the images (N,), by score.
        ood_scores: of OOD pictures, (kinds, M), by score.
        cosine, same: (K, N) after each of `CHANGES`, the cosine to the picture's own image_embeds,
            and whether the answer stays; NaN where it was not tried.
    """

    similarity: np.ndarray
    prompt_classes: np.ndarray
    ood: OODThreshold
    own_scores: dict[str, np.ndarray]
    ood_scores: dict[str, np.ndarray]
    cosine: np.ndarray
    same: np.ndarray


def run_probe(
    embeds: dict[str, np.ndarray], splits: dict[str, Dataset], domain: Domain
) -> Predictions:
    """A probe on the base's image_embeds of each split, calibrated and run as the others are."""
    train, validation = (
        (embeds[name], np.array(splits[name]["label"])) for name in ("train", "validation")
    )
    probe = fit_probe(train, validation, len(domain.classes))
    return predict(probe, embeds, splits, domain, reference=True)


def fit_and_run(
    model: CLIPModel,
    processor: CLIPProcessor,
    domain: Domain,
    splits: dict[str, Dataset],
    title: str,
    reference: bool = False,
) -> Outputs:
    """`predict` of a CLIPModel, also on OOD pictures and after mild changes.

    Args:
        title: of the model, for progress bars.
        reference: the validation split, by which a probe is chosen, is embedded too.
    """

    def embed(images: Iterable[Image.Image], total: int, what: str) -> np.ndarray:
        return encode_images(model, processor, images, total, description=f"{what}, {title}")

    def embed_ood(own: Dataset, seed: int) -> np.ndarray:
        side, pictures = image_side(processor), own[:PER_KIND]["image"]
        drawn = chain.from_iterable(ood_pictures(kind, side, seed, pictures) for kind in KINDS)
        return embed(drawn, PER_KIND * len(KINDS), "OOD pictures")

    embeds = {
        name: embed((row["image"] for row in rows), len(rows), f"{name} split")
        for name, rows in splits.items()
        if reference or name != "validation"
    }
    prototypes = encode_texts(model, processor, domain.canonical_prompts).cpu().numpy()  # (C, D)
    class_means = fit_class_means(embeds["train"], np.array(splits["train"]["label"]))
    unfitted = Head(prototypes, class_means, model.logit_scale.item())
    found = predict(unfitted, embeds, splits, domain, reference)
    head, test = found.head, splits["test"]
    # Other OOD pictures choose the score than those that the scorecard is made of.
    own, choosing = embeds["calibration"], embed_ood(splits["calibration"], seed=1)
    ood = fit_ood_threshold(head.ood_scores(own), head.ood_scores(choosing))
    ood_scores = head.ood_scores(embed_ood(test, seed=0))

    tried = np.unique(np.linspace(0, len(test) - 1, CHANGED_IMAGES).astype(int))
    pictures = (change(row["image"]) for change in CHANGES.values() for row in test.select(tried))
    after = embed(pictures, len(CHANGES) * len(tried), "mild changes")
    after = after.reshape(len(CHANGES), len(tried), -1)  # (K, T, D)
    cosine, same = np.full((2, len(CHANGES), len(test)), np.nan)
    cosine[:, tried] = (after * embeds["test"][tried]).sum(axis=2)
    same[:, tried] = head.logits(after).argmax(axis=2) == found.predicted[tried]
    prompts, prompt_classes = domain.prompt_bank
    return Outputs(
        **vars(found),
        similarity=embeds["test"] @ encode_texts(model, processor, prompts).cpu().numpy().T,
        prompt_classes=np.array(prompt_classes),
        ood=ood,
        own_scores=head.ood_scores(embeds["test"]),
        ood_scores={name: each.reshape(len(KINDS), -1) for name, each in ood_scores.items()},
        cosine=cosine,
        same=same,
    )


def write_predictions(
    path: Path, domain: Domain, test: Dataset, tuned: Outputs, base: Outputs
) -> None:
    """A Parquet file of each test image with its label and what is said of it."""
    names = np.array(domain.class_names)
    columns = {
        "source_id": test["source_id"][:],
        "sha256": test["sha256"][:],
        "label": names[test["label"]].tolist(),
        "probabilities": tuned.calibrated.tolist(),
        "base_probabilities": base.calibrated.tolist(),
        "prediction_set": [names[row].tolist() for row in tuned.sets],
        "domain_score": tuned.own_scores[tuned.ood.score].tolist(),
    }
    with quiet_datasets(), replaced_file(path) as unfinished:
        Dataset.from_dict(columns).to_parquet(unfinished)
