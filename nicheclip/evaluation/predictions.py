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
        title: names the model beside the progress bars.
        reference: as in `calibrate_temperature`; its validation split is encoded too, which
            chooses its probe.

    Attributes:
        features: pooled, of each split, (N, F).
        similarity: (N, P) cosine with every prompt of the bank, of the classes `prompt_classes`.
        ood: the score and threshold that decide.
        own_scores: of the images (N,), by score.
        ood_scores: of OOD pictures, (kinds, M), by score.
        cosine, same: (K, N) after each of `CHANGES`, the cosine to the picture's own image_embeds,
            and whether the answer stays; NaN where it was not tried.
    """

    def __init__(
        self,
        model: CLIPModel,
        processor: CLIPProcessor,
        domain: Domain,
        splits: dict[str, Dataset],
        title: str,
        reference: bool = False,
    ):
        def embed(images: Iterable[Image.Image], total: int, what: str, **more: Any) -> np.ndarray:
            about = f"{what}, {title}"
            return encode_images(model, processor, images, total, description=about, **more)

        def scores_of_ood(name: str, seed: int) -> dict[str, np.ndarray]:
            given = image_side(processor), seed, splits[name][: ood.PER_KIND]["image"]
            drawn = chain.from_iterable(ood.ood_pictures(kind, *given) for kind in ood.KINDS)
            total = ood.PER_KIND * len(ood.KINDS)
            return self.head.ood_scores(embed(drawn, total, "OOD pictures"))

        embeds, self.features, tower = {}, {}, VisualTower(model)
        for name, rows in splits.items():
            if not reference and name == "validation":
                continue
            images = (row["image"] for row in rows)
            self.features[name] = embed(images, len(rows), f"{name} split", pooled=True)
            with torch.inference_mode():
                projected = tower.project(torch.from_numpy(self.features[name]).to(model.device))
            embeds[name] = projected.cpu().numpy()
        prompts, prompt_classes = domain.prompt_bank
        prototypes, bank = (
            encode_texts(model, processor, texts).cpu().numpy()
            for texts in (domain.canonical_prompts, prompts)
        )
        class_means = ood.fit_class_means(embeds["train"], np.array(splits["train"]["label"]))
        head = Head(prototypes, class_means, model.logit_scale.item())
        super().__init__(head, embeds, splits, domain, reference)
        self.similarity, self.prompt_classes = embeds["test"] @ bank.T, np.array(prompt_classes)
        # Other OOD pictures choose the score than those that the scorecard is made of.
        own, choosing = self.head.ood_scores(embeds["calibration"]), scores_of_ood("calibration", 1)
        self.ood = ood.fit_ood_threshold(own, choosing)
        self.own_scores, others = self.head.ood_scores(embeds["test"]), scores_of_ood("test", 0)
        self.ood_scores = {name: each.reshape(len(ood.KINDS), -1) for name, each in others.items()}

        count, kinds = len(self.labels), len(CHANGES)
        tried = np.unique(np.linspace(0, count - 1, CHANGED_IMAGES).astype(int))  # (T,)
        test = splits["test"].select(tried)
        changed = (change(row["image"]) for change in CHANGES.values() for row in test)
        after = embed(changed, kinds * len(test), "mild changes").reshape(kinds, len(test), -1)
        self.cosine, self.same = np.full((2, kinds, count), np.nan)
        self.cosine[:, tried] = (after * embeds["test"][tried]).sum(axis=2)
        self.same[:, tried] = self.head.logits(after).argmax(axis=2) == self.predicted[tried]


Probes = dict[str, Predictions]  # by the name that they have in a `Measure`


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
