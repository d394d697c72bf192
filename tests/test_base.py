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
    seeds = [[77, index] for index in range(PER_CLASS)]
    return [draw(style, np.random.default_rng(seed), 96) for style in STYLES for seed in seeds]


def test_zero_shot_accuracy_lies_in_its_band(drawings):
    model, processor = load_clip(FACADES / "base")
    prototypes = encode_texts(model, processor, Domain.load(FACADES).canonical_prompts).numpy()
    image_embeds = encode_images(model, processor, drawings, len(drawings))
    predicted = (image_embeds @ prototypes.T).argmax(axis=1)
    accuracy = (predicted == np.repeat(np.arange(len(STYLES)), PER_CLASS)).mean()
    assert 0.45 <= accuracy <= 0.70


def test_the_base_is_small_and_holds_no_pickle():
    files = list((FACADES / "base").iterdir())
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    assert sum(path.stat().st_size for path in files) < 8_500_000


def test_styles_and_domain_agree():
    assert tuple(Domain.load(FACADES).class_names) == STYLES


def test_padding_does_not_change_a_prompt():
    model = CLIPModel.from_pretrained(FACADES / "base").float().eval()
    processor = CLIPProcessor.from_pretrained(FACADES / "base")
    prompts = ["a drawing of a gothic building"]
    prompts += ["something soaring, narrow and pointed, quite unlike ANY café №7"]

    def features(prompts: list[str], **padding) -> torch.Tensor:
        tokens = processor.tokenizer(prompts, return_tensors="pt", **padding)
        return model.get_text_features(**tokens).pooler_output

    with torch.inference_mode():
        alone, together = features(prompts[:1]), features(prompts, padding=True)
        full = features(prompts, padding="max_length", max_length=77)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together, full, atol=1e-5, rtol=1e-4)


def test_the_stock_pipeline_takes_it(drawings):
    classify = pipeline("zero-shot-image-classification", model=str(FACADES / "base"))
    template = "a drawing of a {} building"
    answer = classify(drawings[0], candidate_labels=list(STYLES), hypothesis_template=template)
    assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-3)
