"""WiSE-FT: weights between base and fine-tuned (Wortsman et al. 2022, arXiv:2109.01903).

alpha 0 is the base, 1 the fine-tuned model. Between them there is often a model that is as good on
the domain and has forgotten less; which alpha that is, validation says.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import encode_images, encode_texts, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.evaluation.calibration import best_nll
from nicheclip.evaluation.intervals import proportion
from nicheclip.evaluation.metrics import correct
from nicheclip.evaluation.robustness import retention_accuracy
from nicheclip.run import load_retention
from nicheclip.training.arguments import StagedTrainingArguments

ALPHAS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def interpolate(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """(1 - alpha) * base + alpha * tuned, for every floating tensor, `logit_scale` included.

    Args:
        base, tuned: state dicts of the same architecture.
        alpha: 0 gives the base, bit for bit, and 1 the fine-tuned model.

    Returns:
        a state dict of its own storage, floating tensors in float32 on the base's device; others
        are the base's.

    Raises:
        ValueError: if alpha is outside of [0, 1], or names or shapes differ.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha:g}; expected 0 (the base) to 1 (the fine-tuned model)")
    different = sorted(set(base) ^ set(tuned)) or [
        name for name in base if base[name].shape != tuned[name].shape
    ]
    if different:
        raise ValueError(
            f"the base and the fine-tuned model differ in '{different[0]}'; expected the base "
            "that was fine-tuned"
        )
    mixed = {}
    for name, start in base.items():
        end = tuned[name].to(start.device)
        if not start.is_floating_point():
            mixed[name] = start.clone()
        elif alpha in (0, 1):  # no arithmetic: it would turn -0.0 to 0.0, and 0 * infinity to NaN
            mixed[name] = (end if alpha else start).to(torch.float32, copy=True)
        else:
            mixed[name] = (1 - alpha) * start.float() + alpha * end.float()
    return mixed


def choose_alpha(
    base: CLIPModel,
    tuned: CLIPModel,
    processor: CLIPProcessor,
    validation: datasets.Dataset | None,
    canonical_prompts: list[str],
    retention: tuple[datasets.Dataset, list[str]] | None = None,
    alphas: Sequence[float] = ALPHAS,
    retention_drop: float = 1.0,
) -> tuple[float, list[dict[str, Any]]]:
    """Tries each alpha as the zero-shot classifier of the domain; neither model is changed.

    Args:
        validation: prepared rows: image, label, group_id; None: only the retention task is asked.
        canonical_prompts: one of each class (C,).
        retention: rows of image and label, and the canonical prompts, of the retention task.
        retention_drop: what the accuracy on it may lose, from the smallest alpha on.

    Returns:
        the alpha that `best_alpha` takes; and of each, as training.json has it, "accuracy" and
        "nll" (in nats, at the temperature that suits validation), and the accuracy on the
        "retention" task, or None.

    Raises:
        ValueError: as `interpolate`.
    """
    start, end, model = base.state_dict(), tuned.state_dict(), copy.deepcopy(base).float().eval()
    table = []
    for alpha in tqdm(alphas, desc="WiSE-FT", unit="alpha", leave=False):
        model.load_state_dict(interpolate(start, end, alpha))
        row: dict[str, Any] = {"alpha": alpha, "accuracy": None, "nll": None, "retention": None}
        if validation is not None:
            labels, groups = np.array(validation["label"]), np.array(validation["group_id"])
            images = (row["image"] for row in validation)
            embeds = encode_images(model, processor, images, len(labels), progress=False)
            prototypes = encode_texts(model, processor, canonical_prompts)
            logits = zero_shot_logits(model, embeds, prototypes)  # (N, C)
            accuracy = proportion(correct(logits, labels), groups, "validation")
            row |= {"accuracy": accuracy.to_dict(), "nll": best_nll(logits, labels)}
        if retention is not None:
            rows, prompts = retention
            images, asked = (row["image"] for row in rows), np.array(rows["label"])
            kept = retention_accuracy(model, processor, images, asked, prompts, progress=False)
            row["retention"] = kept.to_dict()
        table.append(row)
    return best_alpha(table, retention_drop), table


def best_alpha(table: list[dict[str, Any]], retention_drop: float) -> float:
    """That of the lowest NLL of those that lose no more on the retention task than this.

    Of several the smallest. The rows are those of `choose_alpha`.
    """
    allowed = table
    if table[0]["retention"] is not None:
        of_base = min(table, key=lambda row: row["alpha"])["retention"]["value"]
        allowed = [row for row in table if row["retention"]["value"] >= of_base - retention_drop]
    return min(allowed, key=lambda row: (round(row["nll"] or 0.0, 4), row["alpha"]))["alpha"]


def mix_with_base(
    domain: Domain,
    tuned: CLIPModel,
    args: StagedTrainingArguments,
    validation: datasets.Dataset | None,
    run: Path,
) -> dict[str, Any]:
    """Mixes the domain's base into `tuned`, in place.

    Args:
        args: whose `wise_ft` is the alpha, or "auto" for the one that `choose_alpha` chooses.
        validation: as in `choose_alpha`.
        run: whose retention task is asked, if there is one.

    Returns:
        for training.json: "alpha", "asked", and "mixtures", what each alpha is worth; at least the
        two ends.
    """
    base, processor = load_clip(domain.base)
    auto = args.wise_ft == "auto"
    alphas = ALPHAS if auto else sorted({0.0, float(args.wise_ft), 1.0})
    rows, task = load_retention(run), domain.retention
    retention = (rows, task.canonical_prompts) if rows and task else None
    best, table = choose_alpha(
        base,
        tuned,
        processor,
        validation,
        domain.canonical_prompts,
        retention,
        alphas,
        args.retention_drop,
    )
    alpha = best if auto else float(args.wise_ft)
    tuned.load_state_dict(interpolate(base.state_dict(), tuned.state_dict(), alpha))
    return {"alpha": alpha, "asked": args.wise_ft, "mixtures": table}
