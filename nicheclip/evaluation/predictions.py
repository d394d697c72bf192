"""What models say of the images that they are examined on, calibrated on others."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from nicheclip.clip import VisualTower, encode_texts, image_side
from nicheclip.domain import Domain
from nicheclip.evaluation import ood
from nicheclip.evaluation.calibration import fit
from nicheclip.evaluation.exams import Encoder, Exams, Model
from nicheclip.evaluation.probe import fit_probe, load_strong_probe
from nicheclip.evaluation.robustness import CHANGES
from nicheclip.files import quiet_datasets, replaced_file
from nicheclip.head import Head, prediction_sets, softmax
from nicheclip.run import Training

CHANGED_IMAGES = 300  # on which stability is measured


class Predictions:
    """What is said about the N images that are examined.

    Each round is calibrated on images that are not its exam: no figure judges itself.

    Args:
        of_rounds: of each round its uncalibrated logits (R, C).
        reference: as in `calibrate_temperature`.

    Attributes:
        fits: of each round what `fit` gave; `fitted`: on all that calibrate, as it is published.
        labels, groups: (N,) int, and the near-duplicate groups.
        logits, calibrated, raw: (N, C), the logits and probabilities; raw: before calibration.
        predicted, confidence, right: (N,) the most probable class, its probability, and whether it
            is the label.
        answered: (N,) bool, whether the confidence is above the threshold.
        sets: (N, C) bool, the prediction sets.

    Raises:
        ValueError: if all calibration images are wrong.
    """

    def __init__(
        self,
        exams: Exams,
        of_rounds: Sequence[np.ndarray],
        domain: Domain,
        reference: bool = False,
    ):
        found = exams.out_of_fold(of_rounds)

        def fitted_on(chosen: np.ndarray, published: bool) -> dict[str, Any]:
            known = exams.labels[chosen], exams.groups[chosen]
            resamples = 200 if published else 0  # no one asks for the intervals of the others
            return fit(found[chosen], *known, domain, reference, resamples)

        self.exams, alone = exams, not exams.cross_fitted
        self.fits = [fitted_on(each.calibration, alone) for each in exams.rounds]
        self.fitted = self.fits[0] if alone else fitted_on(exams.asked, published=True)
        self.labels, self.groups = exams.labels[exams.asked], exams.groups[exams.asked]
        uncalibrated = found[exams.asked]
        self.raw = softmax(uncalibrated)
        self.logits = uncalibrated / self._fitted("temperature")[:, None]
        self.calibrated = softmax(self.logits)
        self.predicted = self.calibrated.argmax(axis=1)
        self.confidence = self.calibrated.max(axis=1)
        self.right = self.predicted == self.labels
        self.answered = self.confidence >= self._fitted("abstention", "threshold")
        quantiles = self._fitted("conformal", "quantile")[:, None]
        self.sets = prediction_sets(self.calibrated, quantiles)

    def _fitted(self, *keys: str) -> np.ndarray:
        """(N,) of each image what its round was fitted."""
        values = list(self.fits)
        for key in keys:
            values = [each[key] for each in values]
        return np.array(values)[self.exams.round_of]


class Outputs(Predictions):
    """What CLIPModels say of the images, of OOD pictures, and after mild changes.

    Args:
        models: one for each round.
        encoder: of the images and of other pictures.
        title: names the models beside the progress bars.
        reference: as in `calibrate_temperature`; the images that validate are encoded too, which
            choose its probe.

    Attributes:
        features: of each round, pooled, (R, F); embeds: image_embeds (R, D); 0 for what no one
            asks for.
        heads: of each round, not calibrated.
        similarity: (N, P) cosine with every prompt of the bank, of the classes `prompt_classes`.
        ood: the score and threshold that decide, fitted on all that calibrate.
        own_scores: of the images (N,), by score; accepted: (N,) whether they pass.
        ood_scores: of OOD pictures, (kinds, M), by score; ood_accepted: (kinds, M).
        cosine, same: (K, N) after each of `CHANGES`, the cosine to the picture's own image_embeds,
            and whether the answer stays; NaN where it was not tried.
    """

    def __init__(
        self,
        exams: Exams,
        models: Sequence[Model],
        encoder: Encoder,
        domain: Domain,
        title: str,
        reference: bool = False,
    ):
        self.models, self.encoder, self.title = models, encoder, title
        prompts, prompt_classes = domain.prompt_bank
        self.prompt_classes = np.array(prompt_classes)
        self.features: list[np.ndarray] = []
        self.embeds: list[np.ndarray] = []
        self.heads: list[Head] = []
        banks = []
        for number, (each, model) in enumerate(zip(exams.rounds, models, strict=True), 1):
            if number > 1 and model is models[0]:
                features = self.features[0]
            else:
                needed = np.union1d(np.flatnonzero(each.repeats), exams.told_by(each))
                needed = np.union1d(needed, each.validation) if reference else needed
                fold = f", fold {number}" if exams.cross_fitted else ""
                features = encoded(exams, encoder, model, needed, f"images, {title}{fold}")
            head, embeds = head_of(exams, each, model, features, domain)
            self.features.append(features)
            self.embeds.append(embeds)
            self.heads.append(head)
            banks.append(encode_texts(*model, prompts).cpu().numpy())
        logits = [head.logits(embeds) for head, embeds in zip(self.heads, self.embeds, strict=True)]
        super().__init__(exams, logits, domain, reference)
        said = zip(self.embeds, banks, strict=True)
        self.similarity = exams.out_of_fold([e @ bank.T for e, bank in said])[exams.asked]
        self._judge_ood()
        self._change_mildly()

    def _embed(
        self, number: int, pictures: Iterable[Image.Image], total: int, what: str, seed: int = 0
    ) -> np.ndarray:
        title, key = f"{what}, {self.title}", f"{what} {number} {seed}"
        return self.encoder.pictures(self.models[number], pictures, total, title, key)

    def _judge_ood(self) -> None:
        """Other OOD pictures choose the score than those that the scorecard is made of."""
        exams = self.exams
        choosing, judging = self._ood_pictures(1), self._ood_pictures(0)
        turn = np.arange(ood.PER_KIND) % len(exams.rounds)
        shape = len(ood.KINDS), ood.PER_KIND
        self.own_scores: dict[str, np.ndarray] = {}
        self.ood_scores: dict[str, np.ndarray] = {}
        self.accepted, self.ood_accepted = np.zeros(len(exams.asked), bool), np.zeros(shape, bool)
        for number, (each, fitted) in enumerate(zip(exams.rounds, self.fits, strict=True)):
            heads = [head.at(fitted["temperature"]) for head in self.heads]
            own, rule = self._fit_ood(heads, choosing, each.calibration, number)
            mine, asked = exams.round_of == number, turn == number
            of_pictures = _scores(heads, judging)
            for name, values in own.items():
                self.own_scores.setdefault(name, np.zeros(len(mine)))[mine] = values[each.exam]
                told = self.ood_scores.setdefault(name, np.zeros(shape))
                told[:, asked] = of_pictures[name][:, asked]
            score, threshold = rule["score"], rule["threshold"]
            self.accepted[mine] = self.own_scores[score][mine] >= threshold
            self.ood_accepted[:, asked] = self.ood_scores[score][:, asked] >= threshold
        self.ood = rule
        if exams.cross_fitted:
            heads = [head.at(self.fitted["temperature"]) for head in self.heads]
            _, self.ood = self._fit_ood(heads, choosing, exams.asked, None)

    def _fit_ood(
        self,
        heads: list[Head],
        choosing: list[np.ndarray],
        fitted_on: np.ndarray,
        left_out: int | None,
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Scores (R,) of the images, and the rule that they and the choosing pictures give.

        Args:
            left_out: the round whose pictures don't choose, if there are others.
        """
        exams = self.exams
        of_rounds = [
            head.ood_scores(embeds) for head, embeds in zip(heads, self.embeds, strict=True)
        ]
        own = {name: exams.out_of_fold([each[name] for each in of_rounds]) for name in of_rounds[0]}
        turn = np.arange(ood.PER_KIND) % len(heads)
        chooses = (turn != left_out) | (len(heads) == 1)
        known = {name: values[fitted_on] for name, values in own.items()}
        drawn = _scores(heads, choosing).items()
        pictures = {name: each[:, chooses].ravel() for name, each in drawn}
        return own, ood.fit_ood_threshold(known, pictures)

    def _ood_pictures(self, seed: int) -> list[np.ndarray]:
        """image_embeds (kinds, m, D) of each round's share of them; spoilt ones are its own."""
        exams, found = self.exams, []
        for number, each in enumerate(exams.rounds):
            side = image_side(self.models[number][1])
            own = each.exam if exams.cross_fitted or not seed else each.calibration
            if exams.cross_fitted:  # others judge than choose
                own = own[seed::2]
            own = own[: ood.PER_KIND]
            given = side, seed, exams.rows[own]["image"]
            drawn = (
                picture
                for kind in ood.KINDS
                for turn, picture in enumerate(ood.ood_pictures(kind, *given))
                if turn % len(exams.rounds) == number
            )
            count = len(range(number, ood.PER_KIND, len(exams.rounds)))
            embeds = self._embed(number, drawn, count * len(ood.KINDS), "OOD pictures", seed)
            found.append(embeds.reshape(len(ood.KINDS), count, -1))
        return found

    def _change_mildly(self) -> None:
        exams, kinds, count = self.exams, len(CHANGES), len(self.labels)
        chosen = np.unique(np.linspace(0, count - 1, CHANGED_IMAGES).astype(int))  # (T,)
        self.cosine, self.same = np.full((2, kinds, count), np.nan)
        for number, head in enumerate(self.heads):
            tried = chosen[exams.round_of[chosen] == number]
            rows = exams.rows.select(exams.asked[tried])
            changed = (change(row["image"]) for change in CHANGES.values() for row in rows)
            after = self._embed(number, changed, kinds * len(rows), "mild changes")
            after = after.reshape(kinds, len(rows), -1)
            before = self.embeds[number][exams.asked[tried]]
            self.cosine[:, tried] = (after * before).sum(axis=2)
            self.same[:, tried] = head.logits(after).argmax(axis=2) == self.predicted[tried]


def encoded(
    exams: Exams, encoder: Encoder, model: Model, needed: np.ndarray, title: str
) -> np.ndarray:
    """Pooled features (R, F) of the rows that are needed, 0 elsewhere."""
    found = encoder.images(model, needed, title)
    features = np.zeros((len(exams.rows), found.shape[1]), found.dtype)
    features[needed] = found
    return features


def head_of(
    exams: Exams, training: Training, model: Model, features: np.ndarray, domain: Domain
) -> tuple[Head, np.ndarray]:
    """The head of a model, not calibrated, and image_embeds (R, D) of pooled features (R, F)."""
    clip, trained = model[0], np.flatnonzero(training.repeats)
    with torch.inference_mode():
        embeds = VisualTower(clip).project(torch.from_numpy(features).to(clip.device)).cpu().numpy()
    prototypes = encode_texts(*model, domain.canonical_prompts).cpu().numpy()
    class_means = ood.fit_class_means(embeds[trained], exams.labels[trained])
    return Head(prototypes, class_means, clip.logit_scale.item()), embeds


def _scores(heads: list[Head], pictures: list[np.ndarray]) -> dict[str, np.ndarray]:
    """(kinds, M) by score of OOD pictures, which the rounds have shared out in turn."""
    found: dict[str, np.ndarray] = {}
    for number, (head, embeds) in enumerate(zip(heads, pictures, strict=True)):
        kinds, count, width = embeds.shape
        for name, each in head.ood_scores(embeds.reshape(-1, width)).items():
            shape = kinds, sum(len(some[0]) for some in pictures)
            told = found.setdefault(name, np.zeros(shape))
            told[:, number :: len(heads)] = each.reshape(kinds, count)
    return found


Probes = dict[str, Predictions]  # by the name that they have in a `Measure`


def run_probes(exams: Exams, base: Outputs, domain: Domain) -> Probes:
    """The linear and the strong probe of the base, calibrated and run as the others are."""
    linear, strong = [], []
    for each, embeds, features in zip(exams.rounds, base.embeds, base.features, strict=True):
        trained = np.setdiff1d(np.flatnonzero(each.repeats), each.validation)
        train, validation = (
            (embeds[some], exams.labels[some]) for some in (trained, each.validation)
        )
        probe = fit_probe(train, validation, len(domain.classes), refit=exams.cross_fitted)
        linear.append(probe.logits(embeds))
        strong.append(load_strong_probe(each.folder).logits(features))
    return {
        "probe": Predictions(exams, linear, domain, reference=True),
        "strong_probe": Predictions(exams, strong, domain, reference=True),
    }


def write_predictions(path: Path, domain: Domain, tuned: Outputs, base: Outputs) -> None:
    """A Parquet file of each image that was examined, with its label and what is said of it."""
    names, rows = np.array(domain.class_names), tuned.exams.rows.select(tuned.exams.asked)
    columns = {
        "source_id": rows["source_id"][:],
        "sha256": rows["sha256"][:],
        "label": names[tuned.labels].tolist(),
        "probabilities": tuned.calibrated.tolist(),
        "base_probabilities": base.calibrated.tolist(),
        "prediction_set": [names[row].tolist() for row in tuned.sets],
        "domain_score": tuned.own_scores[tuned.ood["score"]].tolist(),
    }
    if tuned.exams.cross_fitted:
        columns["fold"] = (tuned.exams.round_of + 1).tolist()
    with quiet_datasets(), replaced_file(path) as unfinished:
        Dataset.from_dict(columns).to_parquet(unfinished)
