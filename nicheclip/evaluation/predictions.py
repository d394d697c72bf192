"""What a model says: its head fitted on the calibration split, and run on the test split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
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
from nicheclip.evaluation.robustness import CHANGES
from nicheclip.files import quiet_datasets, replaced_file
from nicheclip.head import Head, prediction_sets, softmax

CHANGED_IMAGES = 300  # of a split, on which stability is measured


@dataclass(frozen=True)
class Predictions:
    """What a classifier says about the N images of a split.

    Attributes:
        logits: (N, C) calibrated.
        fitted: what `fit` gave.
    """

    logits: np.ndarray
    fitted: dict[str, Any]

    @cached_property
    def raw(self) -> np.ndarray:
        """(N, C) probabilities before calibration."""
        return softmax(self.logits * self.fitted["temperature"])

    @cached_property
    def calibrated(self) -> np.ndarray:
        """(N, C) probabilities."""
        return softmax(self.logits)

    @cached_property
    def sets(self) -> np.ndarray:
        """(N, C) bool, the prediction sets."""
        return prediction_sets(self.calibrated, self.fitted["conformal"]["quantile"])


@dataclass(frozen=True)
class Outputs(Predictions):
    """What a CLIPModel says about the N images of test, and about pictures that are none of them.

    Attributes:
        embeds: image_embeds of each split, (N, D).
        similarity: (N, P) cosine with every prompt of the bank, of the classes `prompt_classes`.
        own_scores: of the images (N,), by score.
        ood_scores: of OOD pictures (M,), by kind and score.
        changed: after mild changes, cosine and whether the answer stays, (N,), NaN: not tried.
    """

    head: Head
    embeds: dict[str, np.ndarray]
    similarity: np.ndarray
    prompt_classes: np.ndarray
    ood: OODThreshold
    own_scores: dict[str, np.ndarray]
    ood_scores: dict[str, dict[str, np.ndarray]]
    changed: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def image_embeds(self) -> np.ndarray:
        """(N, D) of the test split."""
        return self.embeds["test"]


def fit_and_run(
    model: CLIPModel,
    processor: CLIPProcessor,
    domain: Domain,
    splits: dict[str, Dataset],
    title: str,
    reference: bool = False,
) -> Outputs:
    """Fits the head of a CLIPModel on the calibration split and runs it on the test split.

    Args:
        title: of the model, for progress bars.
        reference: as in `fit`; the validation split, by which a probe is chosen, is embedded too.

    Raises:
        ValueError: if all calibration images are wrong.
    """

    def embed(images: Iterable[Image.Image], total: int, what: str) -> np.ndarray:
        return encode_images(model, processor, images, total, description=f"{what}, {title}")

    def embed_ood(own: Dataset, seed: int) -> dict[str, np.ndarray]:
        side, pictures = image_side(processor), own[:PER_KIND]["image"]
        drawn = chain.from_iterable(ood_pictures(kind, side, seed, pictures) for kind in KINDS)
        embeds = embed(drawn, PER_KIND * len(KINDS), "OOD pictures")
        return dict(zip(KINDS, np.split(embeds, len(KINDS)), strict=True))

    names = ["train", "calibration", "test", *(["validation"] if reference else [])]
    embeds = {}
    for name, rows in ((name, splits[name]) for name in names):
        embeds[name] = embed((row["image"] for row in rows), len(rows), f"{name} split")
    train, calibration, test = (splits[name] for name in names[:3])
    prototypes = encode_texts(model, processor, domain.canonical_prompts).cpu().numpy()  # (C, D)
    class_means = fit_class_means(embeds["train"], np.array(train["label"]))
    head = Head(prototypes, class_means, model.logit_scale.item())
    labels, groups = np.array(calibration["label"]), np.array(calibration["group_id"])
    fitted = fit(head.logits(embeds["calibration"]), labels, groups, domain, reference)
    head = replace(head, temperature=fitted["temperature"])
    # Other OOD pictures choose the score than those that the scorecard is made of.
    choosing = np.concatenate(list(embed_ood(calibration, seed=1).values()))
    own, outside = (head.ood_scores(each) for each in (embeds["calibration"], choosing))

    logits = head.logits(embeds["test"])
    tried = np.unique(np.linspace(0, len(test) - 1, CHANGED_IMAGES).astype(int))
    pictures = (change(row["image"]) for change in CHANGES.values() for row in test.select(tried))
    after = embed(pictures, len(CHANGES) * len(tried), "mild changes")
    changed = {}
    for name, image_embeds in zip(CHANGES, np.split(after, len(CHANGES)), strict=True):
        cosine, same = np.full((2, len(test)), np.nan)
        cosine[tried] = (image_embeds * embeds["test"][tried]).sum(axis=1)
        same[tried] = head.logits(image_embeds).argmax(axis=1) == logits[tried].argmax(axis=1)
        changed[name] = cosine, same
    prompts, prompt_classes = domain.prompt_bank
    return Outputs(
        logits=logits,
        fitted=fitted,
        head=head,
        embeds=embeds,
        similarity=embeds["test"] @ encode_texts(model, processor, prompts).cpu().numpy().T,
        prompt_classes=np.array(prompt_classes),
        ood=fit_ood_threshold(own, outside),
        own_scores=head.ood_scores(embeds["test"]),
        ood_scores={kind: head.ood_scores(e) for kind, e in embed_ood(test, seed=0).items()},
        changed=changed,
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
