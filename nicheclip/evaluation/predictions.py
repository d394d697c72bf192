"""What a model says: its head fitted on the calibration split, and run on the test split."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import VisualTower, encode_images, encode_texts, image_side
from nicheclip.domain import Domain
from nicheclip.evaluation import ood
from nicheclip.evaluation.calibration import fit
from nicheclip.evaluation.probe import fit_probe
from nicheclip.evaluation.robustness import CHANGES
from nicheclip.files import quiet_datasets, replaced_file
from nicheclip.head import Head, prediction_sets, softmax

CHANGED_IMAGES = 300  # of a split, on which stability is measured


class Predictions:
    """What a head says about the N images of test, once it is fitted on calibration.

    Args:
        head: not calibrated.
        embeds: image_embeds of each split, (N, D).
        reference: as in `calibrate_temperature`.

    Attributes:
        head, fitted: what `fit` gave.
        labels, groups: (N,) int, and the near-duplicate groups.
        logits, calibrated, raw: (N, C), the logits and probabilities; raw: before calibration.
        predicted, confidence, right: (N,) the most probable class, its probability, and whether it
            is the label.
        sets: (N, C) bool, the prediction sets.

    Raises:
        ValueError: if all calibration images are wrong.
    """

    def __init__(
        self,
        head: Head,
        embeds: dict[str, np.ndarray],
        splits: dict[str, Dataset],
        domain: Domain,
        reference: bool = False,
    ):
        calibration, test = splits["calibration"], splits["test"]
        known = np.array(calibration["label"]), np.array(calibration["group_id"])
        self.head, self.fitted = fit(head, embeds["calibration"], *known, domain, reference)
        self.embeds = embeds
        self.labels, self.groups = np.array(test["label"]), np.array(test["group_id"])
        self.raw = head.probabilities(embeds["test"])
        self.logits = self.head.logits(embeds["test"])
        self.calibrated = softmax(self.logits)
        self.predicted = self.calibrated.argmax(axis=1)
        self.confidence = self.calibrated.max(axis=1)
        self.right = self.predicted == self.labels
        self.sets = prediction_sets(self.calibrated, self.fitted["conformal"]["quantile"])


class Outputs(Predictions):
    """What a CLIPModel says of the images of test, of OOD pictures, and after mild changes.

    Args:
        embeds: image_embeds of each split, of OOD pictures (kinds * M, D), and after mild changes
            (K, T, D); text_embeds of "prototypes" (C, D) and "prompts" (P, D).
        features: pooled, of each split, (N, F).
        trained_logit_scale: as in `Head`.

    Attributes:
        similarity: (N, P) cosine with every prompt of the bank, of the classes `prompt_classes`.
        ood: the score and threshold that decide.
        own_scores: of the images (N,), by score.
        ood_scores: of OOD pictures, (kinds, M), by score.
        cosine, same: (K, N) after each of `CHANGES`, the cosine to the picture's own image_embeds,
            and whether the answer stays; NaN where it was not tried.
    """

    def __init__(
        self,
        embeds: dict[str, np.ndarray],
        features: dict[str, np.ndarray],
        trained_logit_scale: float,
        splits: dict[str, Dataset],
        domain: Domain,
        reference: bool = False,
    ):
        class_means = ood.fit_class_means(embeds["train"], np.array(splits["train"]["label"]))
        head = Head(embeds["prototypes"], class_means, trained_logit_scale)
        super().__init__(head, embeds, splits, domain, reference)
        self.features = features
        self.similarity = embeds["test"] @ embeds["prompts"].T
        self.prompt_classes = np.array(domain.prompt_bank[1])
        own, choosing, self.own_scores, others = (
            self.head.ood_scores(embeds[name])
            for name in ("calibration", "OOD, choosing", "test", "OOD")
        )
        self.ood = ood.fit_ood_threshold(own, choosing)
        self.ood_scores = {name: each.reshape(len(ood.KINDS), -1) for name, each in others.items()}
        after, tried = embeds["changed"], _tried(len(self.labels))  # (K, T, D), (T,)
        self.cosine, self.same = np.full((2, len(CHANGES), len(self.labels)), np.nan)
        self.cosine[:, tried] = (after * embeds["test"][tried]).sum(axis=2)
        self.same[:, tried] = self.head.logits(after).argmax(axis=2) == self.predicted[tried]


Probes = dict[str, Predictions]  # by the name that they have in a `Measure`


def fit_and_run(
    model: CLIPModel,
    processor: CLIPProcessor,
    domain: Domain,
    splits: dict[str, Dataset],
    title: str,
    reference: bool = False,
) -> Outputs:
    """Encodes all that `Outputs` needs; of a reference validation too, which chooses its probe."""

    def embed(images: Iterable[Image.Image], total: int, what: str, **options: Any) -> np.ndarray:
        about = f"{what}, {title}"
        return encode_images(model, processor, images, total, description=about, **options)

    def embed_ood(own: Dataset, seed: int) -> np.ndarray:
        given = image_side(processor), seed, own[: ood.PER_KIND]["image"]
        drawn = chain.from_iterable(ood.ood_pictures(kind, *given) for kind in ood.KINDS)
        return embed(drawn, ood.PER_KIND * len(ood.KINDS), "OOD pictures")

    embeds, features, tower = {}, {}, VisualTower(model)
    for name, rows in splits.items():
        if not reference and name == "validation":
            continue
        images = (row["image"] for row in rows)
        features[name] = embed(images, len(rows), f"{name} split", pooled=True)
        with torch.inference_mode():
            projected = tower.project(torch.from_numpy(features[name]).to(model.device))
        embeds[name] = projected.cpu().numpy()
    # Other OOD pictures choose the score than those that the scorecard is made of.
    embeds["OOD, choosing"] = embed_ood(splits["calibration"], seed=1)
    embeds["OOD"] = embed_ood(splits["test"], seed=0)
    test = splits["test"].select(_tried(len(splits["test"])))
    changed = (change(row["image"]) for change in CHANGES.values() for row in test)
    after = embed(changed, len(CHANGES) * len(test), "mild changes")
    embeds["changed"] = after.reshape(len(CHANGES), len(test), -1)
    embeds["prototypes"] = encode_texts(model, processor, domain.canonical_prompts).cpu().numpy()
    embeds["prompts"] = encode_texts(model, processor, domain.prompt_bank[0]).cpu().numpy()
    return Outputs(embeds, features, model.logit_scale.item(), splits, domain, reference)


def _tried(count: int) -> np.ndarray:
    """Which of the test images are changed, evenly spread, (T,) int."""
    return np.unique(np.linspace(0, count - 1, CHANGED_IMAGES).astype(int))


def run_probes(strong: Head, base: Outputs, splits: dict[str, Dataset], domain: Domain) -> Probes:
    """The linear and the strong probe of the base, calibrated and run as the others are."""
    train, validation = (
        (base.embeds[name], np.array(splits[name]["label"])) for name in ("train", "validation")
    )
    linear = fit_probe(train, validation, len(domain.classes))
    return {
        "probe": Predictions(linear, base.embeds, splits, domain, reference=True),
        "strong_probe": Predictions(strong, base.features, splits, domain, reference=True),
    }


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
        "domain_score": tuned.own_scores[tuned.ood["score"]].tolist(),
    }
    with quiet_datasets(), replaced_file(path) as unfinished:
        Dataset.from_dict(columns).to_parquet(unfinished)
