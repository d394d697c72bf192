"""The visual tower as ONNX, in 32 bits and with weights of 8 bits, and what the latter cost.

A file is published only if it says what the model says: FP32 to rounding, INT8 within the limits
below.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel

from nicheclip.classifier import ONNX_FILES, NicheClassifier, VisualTower
from nicheclip.evaluation.metrics import expected_calibration_error
from nicheclip.files import write_json
from nicheclip.head import softmax
from nicheclip.run import load_prepared

MAX_IMAGES = 500  # of the calibration split, on which ONNX is compared with torch
MAX_FP32_DIFFERENCE = 1e-4  # of any number of the image_embeds
MAX_ACCURACY_DROP = 0.02
MAX_ECE_GROWTH = 0.02
MIN_MEAN_COSINE = 0.98
BATCH_SIZE = 50


def add_onnx(run: Path, folder: Path) -> dict[str, Any]:
    """Writes the `ONNX_FILES` and onnx/report.json, INT8 only within the limits.

    Returns:
        the report: "split" and "n", what was compared on; "torch", "fp32" and "int8", each with
        accuracy and ECE, the latter two with their file; "int8" has "published" and "reasons", the
        limits that it exceeds.

    Raises:
        ImportError: if onnx, onnxruntime or onnxscript is not installed.
        ValueError: if FP32 does not agree with torch.
    """
    fp32, int8 = (folder / name for name in ONNX_FILES.values())
    fp32.parent.mkdir()
    export_tower(VisualTower(CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()), fp32)
    quantize(fp32, int8)

    rows = load_prepared(run)["calibration"]
    rows = rows.select(np.unique(np.linspace(0, len(rows) - 1, MAX_IMAGES).astype(int)))
    labels = np.array(rows["label"])
    report: dict[str, Any] = {"split": "calibration", "n": len(rows)}
    embeds = {}
    for name, backend in (("torch", "torch"), ("fp32", "onnx"), ("int8", "onnx-int8")):
        classifier = NicheClassifier.from_pretrained(folder, backend=backend)
        batches = (
            rows[start : start + BATCH_SIZE]["image"] for start in range(0, len(rows), BATCH_SIZE)
        )
        embeds[name] = torch.cat([classifier.image_embeds(images) for images in batches])  # (N, D)
        probabilities = softmax(classifier.head.logits(embeds[name].numpy()))
        right = probabilities.argmax(axis=1) == labels
        report[name] = {
            "accuracy": float(right.mean()),
            "ece": expected_calibration_error(probabilities.max(axis=1), right),
        }
        if backend != "torch":
            report[name] |= {
                "file": ONNX_FILES[backend],
                "bytes": (folder / ONNX_FILES[backend]).stat().st_size,
                "max_difference": (embeds[name] - embeds["torch"]).abs().max().item(),
                "mean_cosine": (embeds[name] * embeds["torch"]).sum(dim=-1).mean().item(),
            }
    if report["fp32"]["max_difference"] > MAX_FP32_DIFFERENCE:
        raise ValueError(
            f"the image_embeds of '{fp32.name}' differ from torch's by up to "
            f"{report['fp32']['max_difference']:.1e}, expected at most {MAX_FP32_DIFFERENCE:.0e}; "
            "build without --onnx, or with other versions of torch and onnxruntime"
        )
    reasons = int8_reasons(report)
    report["int8"] |= {"published": not reasons, "reasons": reasons}
    if reasons:
        int8.unlink()
    write_json(fp32.parent / "report.json", report)
    return report


def int8_reasons(report: dict[str, Any]) -> list[str]:
    """The limits that INT8 exceeds, in words; none, if it may be published."""
    exact, int8 = report["torch"], report["int8"]
    reasons = []
    if exact["accuracy"] - int8["accuracy"] > MAX_ACCURACY_DROP:
        reasons.append(
            f"accuracy falls from {exact['accuracy']:.3f} to {int8['accuracy']:.3f}, by more than "
            f"{MAX_ACCURACY_DROP}"
        )
    if int8["ece"] - exact["ece"] > MAX_ECE_GROWTH:
        reasons.append(
            f"ECE grows from {exact['ece']:.3f} to {int8['ece']:.3f}, by more than {MAX_ECE_GROWTH}"
        )
    if int8["mean_cosine"] < MIN_MEAN_COSINE:
        reasons.append(
            f"the mean cosine to torch's image_embeds is {int8['mean_cosine']:.3f}, below "
            f"{MIN_MEAN_COSINE}"
        )
    return reasons


def export_tower(tower: VisualTower, path: Path) -> None:
    """Writes a tower as one ONNX file: pixel_values (B, 3, S, S) -> image_embeds (B, D), any B.

    Raises:
        ImportError: if onnx or onnxscript is not installed.
    """
    _demand_onnx()
    side = tower.vision_model.config.image_size
    with _quiet():
        torch.onnx.export(
            tower,
            # 2: the exporter would take a batch of 1 for a constant
            (torch.zeros(2, 3, side, side),),
            path,
            input_names=["pixel_values"],
            output_names=["image_embeds"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )


def quantize(fp32: Path, int8: Path) -> None:
    """Dynamic quantization: weights of linear layers in 8 bits, activations as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            fp32,
            int8,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # 7 bits are used: products of 8 overflow on processors without VNNI
        )


def _demand_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX needs {error.name}, which is not installed; run `pip install -c "
            "constraints.txt '.[onnx]'`"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on operators and preparations that are not needed here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
