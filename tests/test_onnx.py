"""The visual tower as ONNX says what torch's says, or is not published.

And what a classifier takes and refuses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nicheclip import NicheClassifier
from nicheclip.classifier import ONNX_FILES
from nicheclip.publishing.onnx import MAX_FP32_DIFFERENCE, add_onnx
from nicheclip.run import load_prepared


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "hub"
    shutil.copytree(run / "hub", folder)
    with pytest.MonkeyPatch.context() as patch:
        # of 120 images the ECE moves by 0.02 by chance
        patch.setattr("nicheclip.publishing.onnx.MAX_ECE_GROWTH", 0.1)
        add_onnx(run, folder)
    return folder


@pytest.fixture(scope="module")
def images(run: Path) -> list[Image.Image]:
    return [row["image"] for row in load_prepared(run)["test"].select(range(7))]


def both(published: Path, backend: str) -> list[NicheClassifier]:
    names = ("torch", backend)
    return [NicheClassifier.from_pretrained(published, backend=name) for name in names]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnx_gives_what_torch_gives_for_any_number_of_images(published, images, count):
    images = images[:count]
    exact, onnx = both(published, "onnx")
    embeds = onnx.image_embeds(images), exact.image_embeds(images)
    np.testing.assert_allclose(*embeds, atol=MAX_FP32_DIFFERENCE)
    for one, other in zip(onnx(images), exact(images), strict=True):
        for name in ("label", "prediction_set", "outside"):
            assert getattr(one, name) == getattr(other, name)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
    with pytest.raises(ValueError, match="no text tower"):
        onnx.text_embeds(["a house"])


def test_int8_is_smaller_and_nearly_the_same(run, published, images):
    exact, int8 = both(published, "onnx-int8")
    sizes = {name: (published / file).stat().st_size for name, file in ONNX_FILES.items()}
    assert sizes["onnx-int8"] < 0.5 * sizes["onnx"]
    cosine = (exact.image_embeds(images) * int8.image_embeds(images)).sum(dim=1)
    assert 0.98 < cosine.min() < 1
    report = json.loads((published / "onnx" / "report.json").read_text())
    calibration = load_prepared(run)["calibration"]
    assert (report["split"], report["n"]) == ("calibration", len(calibration))
    assert report["int8"]["published"]


def test_an_int8_tower_that_drifts_is_left_out_with_the_reason(run, tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(run / "hub", folder)
    weights = load_file(folder / "model.safetensors")
    # One channel a thousand times larger than the others, taken back in the next layer: eight bits
    # hold nothing else.
    norms = [name for name in weights if "layer_norm2.weight" in name]
    for name in [name for name in norms if name.startswith("vision_model")]:
        weights[name][0] *= 1000
        weights[name.replace("weight", "bias")][0] *= 1000
        weights[name.replace("layer_norm2", "mlp.fc1")][:, 0] /= 1000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = add_onnx(run, folder)
    assert not report["int8"]["published"]
    assert "mean cosine" in " ".join(report["int8"]["reasons"])
    assert report["fp32"]["max_difference"] <= MAX_FP32_DIFFERENCE
    files = sorted(path.name for path in (folder / "onnx").iterdir())
    assert files == ["report.json", "vision_model.onnx"]
    with pytest.raises(FileNotFoundError, match="leaves INT8 out where that costs too much"):
        NicheClassifier.from_pretrained(folder, backend="onnx-int8")


def test_a_backend_that_is_not_there_is_told(run):
    with pytest.raises(FileNotFoundError, match="python -m model_card RUN --onnx"):
        NicheClassifier.from_pretrained(run / "hub", backend="onnx")
    with pytest.raises(ValueError, match="backend is 'tpu'; expected 'torch'"):
        NicheClassifier.from_pretrained(run / "hub", backend="tpu")


def test_paths_pictures_arrays_and_bytes_are_the_same_image(run, tmp_path):
    classifier = NicheClassifier.from_pretrained(run / "hub")
    picture = load_prepared(run)["test"][0]["image"].convert("RGB")
    path = tmp_path / "photo.png"
    picture.save(path)
    kinds = [picture, np.asarray(picture), path, str(path), path.read_bytes()]
    embeds = classifier.image_embeds(kinds)
    torch.testing.assert_close(embeds, embeds[:1].expand_as(embeds))
    grey = np.asarray(picture.convert("L"))
    same = [classifier.image_embeds([kind]) for kind in (grey, Image.fromarray(grey))]
    torch.testing.assert_close(*same)
    for one in kinds:
        with pytest.raises(TypeError, match=r"classifier\(\[image\]\)"):
            classifier(one)


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("https://example.org/photo.jpg", ValueError, "nothing is downloaded here"),
        ("no/such/photo.jpg", OSError, "'no/such/photo.jpg' can't be read"),
        (b"I am a text.", OSError, "a bytes can't be read"),
        (np.zeros((2, 2, 5), dtype=np.uint8), TypeError, r"uint8 array \(H, W, 3\)"),
        (np.zeros((2, 2)), TypeError, "uint8 array"),
        (7, TypeError, "got a int; expected a path"),
    ],
    ids=["address", "missing", "text", "channels", "float", "number"],
)
def test_what_is_no_image_is_refused(run, image, error, words):
    with pytest.raises(error, match=words):
        NicheClassifier.from_pretrained(run / "hub").image_embeds([image])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "is of format 2, this NicheCLIP reads 3; publish the model anew"),
        ({"format_version": 99}, "or install the NicheCLIP that made it"),
        ({"class_names": "gothic"}, "class_names is 'gothic', expected a list"),
        ({"temperature": None}, "temperature is None, expected a float"),
        ({"ood": {"score": "energy"}}, "ood.threshold is None, expected a float"),
        ({"ood": {"score": "luck", "threshold": 0.5}}, "ood.score is 'luck'; expected one of"),
        (None, "is damaged"),
    ],
)
def test_settings_that_do_not_fit_are_named(run, tmp_path, change, words):
    unneeded = shutil.ignore_patterns("index", "figures")
    shutil.copytree(run / "hub", tmp_path / "hub", ignore=unneeded)
    path = tmp_path / "hub" / "nicheclip.json"
    settings = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps(settings | change))
    with pytest.raises(ValueError, match=words):
        NicheClassifier.from_pretrained(tmp_path / "hub")
