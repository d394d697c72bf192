"""Which training images are suspected of a wrong label, and how often an epoch has the others."""

import warnings

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from nicheclip.domain import Domain, QualityFilter

# sklearn's C, the inverse strength; the out-of-fold NLL picks one
REGULARIZATIONS = (1.0, 3.0, 10.0, 30.0)
DEFAULT_THRESHOLDS = {"linear_probe": 0.2, "zero_shot": 0.05, "none": 0.0}


def threshold_of(how: QualityFilter) -> float:
    """The score below which an image is suspect."""
    return DEFAULT_THRESHOLDS[how.mode] if how.threshold is None else how.threshold


def out_of_fold_probabilities(
    image_embeds: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int, seed: int = 0
) -> np.ndarray:
    """What a linear probe says of each image that has not seen it, nor a near-duplicate of it.

    Args:
        image_embeds: (N, D) of unit length.
        labels: (N,) int; they may be wrong.
        groups: (N,) near-duplicates share one.

    Returns:
        (N, C) float, rows add up to 1; a class that a fold has not seen has probability 0 there.
    """

    def out_of_fold(some: np.ndarray, strength: float) -> np.ndarray:
        present, own = np.unique(labels[some], return_inverse=True)
        splits = min(5, len(np.unique(groups[some])), np.bincount(own).max())
        if splits < 2 or len(present) < 2:
            # There is nothing to learn from, so nobody is suspected.
            return np.full((len(some), classes), 1 / classes)
        probabilities = np.zeros((len(some), classes))
        probabilities[:, present] = cross_val_predict(
            LogisticRegression(C=strength, tol=1e-3, max_iter=500),
            image_embeds[some],
            own,
            groups=groups[some],
            cv=StratifiedGroupKFold(splits, shuffle=True, random_state=seed),
            method="predict_proba",
        )
        return probabilities

    def loss(strength: float) -> float:
        own = out_of_fold(few, strength)[np.arange(len(few)), labels[few]]
        return -np.log(np.maximum(own, 1e-6)).mean()

    few = np.random.default_rng(seed).permutation(len(labels))[:4000]  # enough to choose by
    strengths = tqdm(REGULARIZATIONS, "judging labels by probes", unit="probe", leave=False)
    # Threads would spend more time on waiting for each other than on matrices of this size. A class
    # may be missing in a fold, and a probe that is nearly converged is as good here.
    with threadpool_limits(1), warnings.catch_warnings(action="ignore"):
        return out_of_fold(np.arange(len(labels)), min(strengths, key=loss))


def suspect_labels(
    images: pd.DataFrame, image_embeds: np.ndarray, zero_shot: np.ndarray, domain: Domain, seed: int
) -> pd.DataFrame:
    """Judges the labels of what trains; those that a person has kept are trusted.

    With cross-fitting each fold's training is judged by itself, since what is examined has no say
    in it; nothing is dropped: a suspect is left out of training, and stays in the exam.

    Args:
        images: (N rows) as `data_prep.divide` gives them.
        image_embeds: (N, D) of unit length.
        zero_shot: (N, C) probabilities.

    Returns:
        the images and, for those that train, the columns of `judge` and outcome: "dropped", "left
        out", "flagged" or None; and of all images `trains`: in which trainings they take part, (T,)
        bool: of the model; with cross-fitting first of the models of the folds.
    """
    how, names = domain.quality_filter, np.array(domain.class_names, dtype=object)
    cross_fit, drops = domain.evaluation == "cross_fit", how.action == "drop"
    labels, groups = domain.indices(images.label), images.group_id.to_numpy()
    trusted = (images.decision == "keep").to_numpy()
    pool = ((images.split != "") if cross_fit else (images.split == "train")).to_numpy()
    pools = [pool & (images.split != fold).to_numpy() for fold in domain.parts if cross_fit]
    trains = []
    for train in map(np.flatnonzero, [*pools, pool]):
        probabilities = zero_shot[train]
        if how.mode == "linear_probe":
            of_train = image_embeds[train], labels[train], groups[train]
            probabilities = out_of_fold_probabilities(*of_train, len(names), seed)
        verdict = judge(probabilities, labels[train], how, trusted[train])
        used = train[~verdict.suspect] if drops else train
        trains.append(np.isin(np.arange(len(images)), used))
    verdict["suspected_label"] = names[verdict.suspected_label]
    outcome = "flagged" if not drops else "left out" if cross_fit else "dropped"
    verdict["outcome"] = verdict.suspect.map({True: outcome, False: None})
    images = images.assign(trains=list(np.transpose(trains)))
    return images.join(verdict.set_index(train))


def judge(
    probabilities: np.ndarray, labels: np.ndarray, how: QualityFilter, trusted: np.ndarray
) -> pd.DataFrame:
    """Finds the images whose own label is unlikely, at most `how.max_drop_share` of a class.

    A threshold relative to the class keeps it from deleting a class of which the base model knows
    little: where all images of a class have a low probability, a low one is nothing suspicious.

    Args:
        probabilities: (N, C), out of fold for `linear_probe`, zero-shot for `zero_shot` and `none`.
        labels: (N,) int.
        trusted: (N,) bool, images that a person has kept; they are never suspected.

    Returns:
        (N rows) score: the probability of the own label, for `linear_probe` over the mean in the
        class; suspected_label: the likeliest other class, int; wanted: whether the score is below
        the threshold; suspect: whether the cap allows it, too.
    """
    everyone, others = np.arange(len(labels)), probabilities.copy()
    others[everyone, labels] = -1
    verdict = pd.DataFrame({"score": probabilities[everyone, labels].astype(float)})
    verdict["suspected_label"] = others.argmax(axis=1)
    if how.mode == "linear_probe":
        # A class without any probability can't be judged: all of it is as good as its mean.
        verdict.score = (verdict.score / verdict.groupby(labels).score.transform("mean")).fillna(1)
    verdict["wanted"] = (verdict.score < threshold_of(how)) & ~trusted & (how.mode != "none")
    wanted = verdict[verdict.wanted]
    place = wanted.groupby(labels[wanted.index]).score.rank(method="first")  # from 1
    most = np.floor(how.max_drop_share * np.bincount(labels))[labels]
    verdict["suspect"] = place.reindex(verdict.index) <= most
    return verdict


def samples_per_epoch(
    labels: np.ndarray, samples_per_class: int, rng: np.random.Generator
) -> np.ndarray:
    """How often an epoch samples each image, at least once; labels (N,) int -> (N,) int."""
    samples = np.ones(len(labels), dtype=np.int32)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        missing = max(0, samples_per_class - len(own))
        samples[own] += missing // len(own)
        samples[own[: missing % len(own)]] += 1
    return samples
