"""The embedded base knows the façades partly: a fine-tune has something to do, and to build on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor, pipeline

from domains.facades.painter import STYLES, draw
from nicheclip.clip import encode_images, encode_texts, load_clip
from nicheclip.domain import Domain
from tests.conftest import FACADES

PER_CLASS = 50


@pytest.fixture(scope="module")
def drawings() -> list:
    return [
        draw(style, np.random.default_rng([77, index]), 96)
        for style in STYLES
        for index in range(PER_CLASS)
    ]


def test_zero_shot_accuracy_lies_in_its_band(drawings):
    model, processor = load_clip(FACADES / "base")
    prototypes = encode_texts(model, processor, Domain.load(FACADES).canonical_prompts).numpy()
    predicted = (encode_images(model, processor, drawings, len(drawings)) @ prototypes.T).argmax(
        axis=1
    )
    accuracy = (predicted == np.repeat(np.arange(len(STYLES)), PER_CLASS)).mean()
    assert 0.45 <= accuracy <= 0.70


def test_the_base_is_small_and_holds_no_pickle():
    files = list((FACADES / "base").iterdir())
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    assert sum(path.stat().st_size for path in files) < 8_500_000


def test_styles_and_domain_agree():
    assert tuple(Domain.load(FACADES).class_names) == STYLES


def test_padding_does_not_change_a_prompt():
    model, processor = (
        CLIPModel.from_pretrained(FACADES / "base"),
        CLIPProcessor.from_pretrained(FACADES / "base"),
    )
    model = model.float().eval()
    prompts = [
        "a drawing of a gothic building",
        "something soaring, narrow and pointed, quite unlike ANY café №7",
    ]
    with torch.inference_mode():
        together = model.get_text_features(
            **processor.tokenizer(prompts, padding=True, return_tensors="pt")
        )
        alone = model.get_text_features(**processor.tokenizer(prompts[:1], return_tensors="pt"))
        full = model.get_text_features(
            **processor.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
        )
    torch.testing.assert_close(
        together.pooler_output[:1], alone.pooler_output, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(together.pooler_output, full.pooler_output, atol=1e-5, rtol=1e-4)


def test_the_stock_pipeline_takes_it(drawings):
    classify = pipeline("zero-shot-image-classification", model=str(FACADES / "base"))
    answer = classify(
        drawings[0], candidate_labels=list(STYLES), hypothesis_template="a drawing of a {} building"
    )
    assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-3)
