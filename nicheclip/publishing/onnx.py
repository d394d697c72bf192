"""The visual tower as ONNX, in 32 bits (FP32) and with weights of 8 (INT8), and what those cost.

A file is published only if it says what the model says: FP32 to rounding, INT8 within the limits
below.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel

from nicheclip.classifier import ONNX_FILES, NicheClassifier
from nicheclip.clip import VisualTower
from nicheclip.evaluation.metrics import expected_calibration_error
from nicheclip.files import write_json
from nicheclip.run import load_prepared

MAX_IMAGES = 500  # of the calibration split, on which ONNX is compared with torch
MAX_FP32_DIFFERENCE = 1e-4  # of any number of the image_embeds
MAX_ACCURACY_DROP = 0.02
MAX_ECE_GROWTH = 0.02
MAX_COSINE_LOSS = 0.02
BATCH_SIZE = 50


def add_onnx(run: Path, folder: Path) -> dict[str, Any]:
    """Writes the `ONNX_FILES` and onnx/report.json, INT8 only within the limits.

    Returns:
        the report: "split" and "n"; "torch", "fp32" and "int8", each with accuracy, ECE, size and
        nearness to torch; "int8" has "published" and "reasons", the limits that it exceeds.

    Raises:
        ImportError: if onnx, onnxruntime or onnxscript is not installed.
        ValueError: if FP32 does not agree with torch.
    """
    paths = {"fp32": folder / ONNX_FILES["onnx"], "int8": folder / ONNX_FILES["onnx-int8"]}
    _export(folder, paths["fp32"], paths["int8"])
    splits = load_prepared(run)
    split = "calibration" if "calibration" in splits else next(iter(splits))
    rows = splits[split]
    rows = rows.select(np.unique(np.linspace(0, len(rows) - 1, MAX_IMAGES).astype(int)))
    report: dict[str, Any] = {"split": split, "n": len(rows)}
    exact = None
    for name, backend in (("torch", "torch"), ("fp32", "onnx"), ("int8", "onnx-int8")):
        classifier = NicheClassifier.from_pretrained(folder, backend=backend)
        batches = rows.iter(BATCH_SIZE)
        embeds = torch.cat([classifier.image_embeds(batch["image"]) for batch in batches]).numpy()
        exact = embeds if exact is None else exact  # (N, D)
        probabilities = classifier.head.probabilities(embeds)
        right = probabilities.argmax(axis=1) == rows["label"][:]
        report[name] = {
            "accuracy": float(right.mean()),
            "ece": expected_calibration_error(probabilities.max(axis=1), right),
            "bytes": paths.get(name, folder / "model.safetensors").stat().st_size,
            "max_difference": float(np.abs(embeds - exact).max()),
            "mean_cosine": float((embeds * exact).sum(axis=1).mean()),
        }
    difference = report["fp32"]["max_difference"]
    if difference > MAX_FP32_DIFFERENCE:
        raise ValueError(
            f"the image_embeds of '{paths['fp32'].name}' differ from torch's by {difference:.1e}, "
            f"expected at most {MAX_FP32_DIFFERENCE:.0e}; build without --onnx"
        )
    reference, int8 = report["torch"], report["int8"]
    costs = [
        ("accuracy falls", reference["accuracy"] - int8["accuracy"], MAX_ACCURACY_DROP),
        ("ECE grows", int8["ece"] - reference["ece"], MAX_ECE_GROWTH),
        ("the mean cosine to torch's image_embeds falls", 1 - int8["mean_cosine"], MAX_COSINE_LOSS),
    ]
    reasons = [f"{what} by {cost:.3f}, over {most}" for what, cost, most in costs if cost > most]
    int8 |= {"published": not reasons, "reasons": reasons}
    if reasons:
        paths["int8"].unlink()
    write_json(folder / "onnx" / "report.json", report)
    return report


def _export(folder: Path, fp32: Path, int8: Path) -> None:
    """The tower of a published folder: pixel_values (B, 3, S, S) -> image_embeds (B, D), any B."""
    try:
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(f"ONNX needs {error.name}; run `pip install '.[onnx]'`") from error
    tower = VisualTower(CLIPModel.from_pretrained(folder, dtype=torch.float32).eval())
    side = tower.vision_model.config.image_size
    fp32.parent.mkdir()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # on operators of torchvision, and on what is not needed here
    try:
        with warnings.catch_warnings(action="ignore"):
            pixels = torch.zeros(2, 3, side, side)  # the exporter takes a batch of 1 for a constant
            shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
            options: dict[str, Any] = {"input_names": [*shapes], "output_names": ["image_embeds"]}
            options |= {"dynamic_shapes": shapes, "external_data": False, "verbose": False}
            torch.onnx.export(tower, (pixels,), fp32, **options)
            quantize_dynamic(
                fp32,
                int8,
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,  # 8 bits would overflow on processors without VNNI
            )
    finally:
        logging.disable(level)
