"""What a model, or a classifier on frozen features, is worth on the test split."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.special import softmax
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from benchmarks.rivals import Rival, strong
from nicheclip.clip import (
    VisualTower,
    encode_images,
    encode_texts,
    image_side,
    load_clip,
    zero_shot_logits,
)
from nicheclip.domain import Domain
from nicheclip.evaluation import metrics
from nicheclip.evaluation.calibration import fit_temperature
from nicheclip.evaluation.ood import PER_KIND, ood_pictures
from nicheclip.evaluation.robustness import retention_accuracy
from nicheclip.run import load_prepared, load_retention
from nicheclip.training.data import TrainingSamples

VIEWS, BATCH = 4, 64  # of the strong probe's training images
Result = dict[str, Any]


def zero_shot(data_run: Path, domain: Domain, ensemble: bool = False) -> Result:
    """The base as it is, with the canonical prompts or the mean of each class's prompts."""
    model, processor = load_clip(domain.base)
    prompts, classes = domain.prompt_bank
    prototypes = None
    if ensemble:
        embeds = encode_texts(model, processor, prompts)  # (P, D)
        of_class = torch.tensor(classes, device=embeds.device)
        means = [embeds[of_class == c].mean(dim=0) for c in range(len(domain.classes))]
        prototypes = normalize(torch.stack(means), dim=-1)  # (C, D)
    return evaluate(model, processor, domain, data_run, prototypes)


def on_features(data_run: Path, domain: Domain, rival: Rival) -> Result:
    """A classifier on the base's frozen features, its settings chosen on validation."""
    model, processor = load_clip(domain.base)
    splits, tower = load_prepared(data_run), VisualTower(model)
    features, embeds = {}, {}
    for name, rows in splits.items():
        images = (row["image"] for row in rows)
        features[name] = encode_images(
            model, processor, images, len(rows), progress=False, pooled=True
        )
        with torch.inference_mode():
            pooled = torch.from_numpy(features[name]).to(model.device)
            embeds[name] = tower.project(pooled).cpu().numpy()
    labels = {name: np.array(rows["label"]) for name, rows in splits.items()}
    prototypes = encode_texts(model, processor, domain.canonical_prompts).cpu().numpy()
    seen = embeds
    if rival is strong:
        seen, tower.pooled = features, True
        samples = TrainingSamples(
            splits["train"], domain.prompt_bank[1], domain.augmentation, processor, seed=0
        )
        seen["train"] = np.concatenate([_of_view(samples, tower, view) for view in range(VIEWS)])
        labels["train"] = np.tile(labels["train"], VIEWS)
    logits = rival(seen, labels, prototypes)
    return _measures(logits, labels, splits["test"], embeds["test"])


@torch.inference_mode()
def _of_view(samples: TrainingSamples, tower: VisualTower, view: int) -> np.ndarray:
    """What the tower makes of one augmented view of each image, (N, F)."""
    parts = []
    for start in range(0, len(samples.rows), BATCH):
        rows = range(start, min(start + BATCH, len(samples.rows)))
        pixels = torch.stack([samples.view(row, view) for row in rows])
        parts.append(tower(pixels.to(tower.visual_projection.weight.device)).cpu().numpy())
    return np.concatenate(parts)


def evaluate(
    model: CLIPModel,
    processor: CLIPProcessor,
    domain: Domain,
    data_run: Path,
    prototypes: torch.Tensor | None = None,
) -> Result:
    """What a model is worth on the test split, its temperature fitted on calibration.

    Args:
        prototypes: (C, D), instead of the embeddings of the canonical prompts.
    """
    splits = load_prepared(data_run)
    if prototypes is None:
        prototypes = encode_texts(model, processor, domain.canonical_prompts)
    embeds = {
        name: _embed(model, processor, splits[name])
        for name in ("validation", "calibration", "test")
    }
    logits = {name: zero_shot_logits(model, embeds[name], prototypes) for name in embeds}
    labels = {name: np.array(splits[name]["label"]) for name in embeds}
    result = _measures(logits, labels, splits["test"], embeds["test"])

    prompts, prompt_classes = domain.prompt_bank
    bank = encode_texts(model, processor, prompts).cpu().numpy()  # (P, D)
    margin = metrics.hard_negative_margin(
        embeds["test"] @ bank.T,
        np.array(prompt_classes),
        labels["test"],
        np.array(domain.class_clusters),
    )
    if np.isfinite(margin).any():
        result["hard_negative_pass_rate"] = float((margin[np.isfinite(margin)] > 0).mean())
    noise = ood_pictures("noise", image_side(processor), seed=0)
    on_noise = encode_images(model, processor, noise, PER_KIND, progress=False)
    scaled = zero_shot_logits(model, on_noise, prototypes) / result["temperature"]
    result["noise_confidence_p95"] = float(np.percentile(softmax(scaled, axis=1).max(axis=1), 95))
    rows = load_retention(data_run)
    if rows is not None and domain.retention is not None:
        images, asked = (row["image"] for row in rows), domain.retention.canonical_prompts
        told = retention_accuracy(
            model, processor, images, np.array(rows["label"]), asked, progress=False
        )
        result["retention"] = told.value
    return result


def _embed(model: CLIPModel, processor: CLIPProcessor, rows: datasets.Dataset) -> np.ndarray:
    images = (row["image"] for row in rows)
    return encode_images(model, processor, images, len(rows), progress=False)


def _measures(
    logits: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    test: datasets.Dataset,
    image_embeds: np.ndarray,
) -> Result:
    """What any classifier has; which test images are right, to pool and pair them."""
    try:
        temperature = fit_temperature(logits["calibration"], labels["calibration"])
    except ValueError:  # all right or all wrong: the images can't identify it
        temperature = 1.0
    raw = softmax(logits["test"], axis=1)
    calibrated = softmax(logits["test"] / temperature, axis=1)
    right = metrics.correct(calibrated, labels["test"])
    predicted, classes = calibrated.argmax(axis=1), calibrated.shape[1]
    on_validation = metrics.correct(logits["validation"], labels["validation"])
    f1 = metrics.class_scores(predicted, labels["test"], classes)[2]
    _, precision = metrics.image_retrieval(image_embeds, labels["test"], np.array(test["group_id"]))
    own = calibrated[np.arange(len(predicted)), labels["test"]]
    return {
        "accuracy": float(right.mean()),
        "validation_accuracy": float(on_validation.mean()),
        "macro_f1": float(np.nanmean(f1)),
        "lost_classes": int((f1 == 0).sum()),
        "nll": float(-np.log(np.maximum(own, 1e-12)).mean()),
        "image_map": float(np.nanmean(precision)),
        "ece_before_calibration": metrics.expected_calibration_error(raw.max(axis=1), right),
        "ece": metrics.expected_calibration_error(calibrated.max(axis=1), right),
        "temperature": temperature,
        "test": {
            "image": [digest[:16] for digest in test["sha256"]],
            "group": list(test["group_id"]),
            "right": right.astype(int).tolist(),
        },
    }
