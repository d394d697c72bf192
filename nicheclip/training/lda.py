"""Where a head can begin: a linear discriminant analysis as visual projection and prototypes."""

from itertools import product

import numpy as np

from nicheclip.evaluation.calibration import best_nll

SHRINKAGES = (0.1, 0.3, 0.6, 0.9)
RESTS = (0.5, 1.0)  # what the directions that tell no classes apart are worth


def discriminants(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    image_embeds: np.ndarray,
    num_classes: int,
) -> dict[str, np.ndarray]:
    """The analysis whose cosines with the class means have the lowest NLL on validation.

    The covariance within classes is shrunk towards a multiple of the identity. The projection
    whitens by it, puts the C - 1 directions that tell classes apart first, weighs the others by
    `RESTS`, and is turned towards the base's image_embeds (orthogonal Procrustes), so that what the
    base's text tower says stays near.

    Args:
        train, validation: the tower's pooled features (N, F), and labels (N,).
        image_embeds: the base's of the training features, (N, D).

    Returns:
        "mean" (F,), to be subtracted from features before "projection" (D, F); "prototypes" (C, D),
        the unit class means; those of a class without an image are 0. And the "shrinkage" and
        "rest" that were chosen.
    """
    features, labels = (part.astype(np.float64, copy=False) for part in train)
    labels = labels.astype(int)
    present = np.unique(labels)
    means = np.stack([features[labels == c].mean(axis=0) for c in present])  # (K, F)
    mean = features.mean(axis=0)
    within = np.cov((features - means[np.searchsorted(present, labels)]).T, bias=True)
    if not np.trace(within):  # one image a class
        within = np.cov(features.T, bias=True)
    size = len(within)
    tried: list[tuple[float, int, dict[str, np.ndarray]]] = []
    for shrinkage, rest in product(SHRINKAGES, RESTS):
        shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / size * np.eye(size)
        values, vectors = np.linalg.eigh(shrunk)
        whitening = vectors / np.sqrt(values) @ vectors.T  # (F, F), symmetric
        _, _, turned = np.linalg.svd((means - mean) @ whitening)  # (F, F), discriminants first
        told_apart = min(len(present) - 1, size)
        gains = np.where(np.arange(size) < told_apart, 1.0, rest)
        kept = min(size, image_embeds.shape[1])
        projection = (gains[:, None] * turned @ whitening)[:kept]  # (k, F)
        seen = _unit((features - mean) @ projection.T)
        left, _, right = np.linalg.svd(image_embeds.T @ seen, full_matrices=False)
        projection = left @ right @ projection  # (D, F)
        seen = _unit((features - mean) @ projection.T)
        prototypes = np.zeros((num_classes, len(projection)))
        prototypes[present] = _unit(np.stack([seen[labels == c].mean(axis=0) for c in present]))
        cosines = _unit((validation[0] - mean) @ projection.T) @ prototypes.T
        found = {"mean": mean, "projection": projection, "prototypes": prototypes}
        found |= {"shrinkage": np.array(shrinkage), "rest": np.array(rest)}
        tried.append((best_nll(10 * cosines, validation[1]), len(tried), found))
    return min(tried)[2]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
