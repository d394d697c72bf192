"""Between the base and the fine-tuned model, and what lies outside of the domain."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.sources import retention_rows
from nicheclip.clip import encode_images, encode_texts, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.evaluation.metrics import correct
from nicheclip.evaluation.robustness import retention_accuracy
from nicheclip.run import load_prepared
from nicheclip.training.wise_ft import choose_alpha, interpolate
from tests.conftest import FACADES


@pytest.fixture(scope="module")
def base():
    return load_clip(FACADES / "base")


@pytest.fixture(scope="module")
def facades() -> Domain:
    return Domain.load(FACADES)


@pytest.fixture(scope="module")
def colours(facades, tmp_path_factory):
    return retention_rows(facades, tmp_path_factory.mktemp("drawn") / "colours")


def perturbed(model, strength: float):
    """A copy with noise in every weight, in proportion to its spread."""
    torch.manual_seed(0)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += strength * torch.randn_like(parameter) * parameter.std(correction=0)
    return tuned


def asked(model, processor, rows, prompts) -> float:
    """The zero-shot accuracy, as the scorecard gets it."""
    images = (row["image"] for row in rows)
    image_embeds = encode_images(model, processor, images, len(rows), progress=False)
    logits = zero_shot_logits(model, image_embeds, encode_texts(model, processor, prompts))
    return correct(logits, np.array(rows["label"])).mean()


def test_the_ends_are_the_models_bit_for_bit_and_the_middle_their_mean(base):
    start, end = base[0].state_dict(), perturbed(base[0], 0.1).state_dict()
    start["visual_projection.weight"][0, 0] = -0.0
    end["text_projection.weight"][0, 0] = torch.inf
    for alpha, model in ((0, start), (1, end)):
        mixed = interpolate(start, end, alpha)
        assert list(mixed) == list(model)
        for name, tensor in model.items():
            assert mixed[name].numpy().tobytes() == tensor.numpy().tobytes(), name
            assert mixed[name].data_ptr() != tensor.data_ptr()
    middle = interpolate(start, end, 0.5)
    for name in ("logit_scale", "vision_model.encoder.layers.0.mlp.fc1.weight"):
        torch.testing.assert_close(middle[name], (start[name] + end[name]) / 2)


def test_half_precision_is_mixed_in_float32_and_counters_are_not_mixed():
    start = {"weight": torch.tensor([1.0]).half(), "steps": torch.tensor([3])}
    end = {"weight": torch.tensor([2.0]).bfloat16(), "steps": torch.tensor([5])}
    mixed = interpolate(start, end, 0.1)
    torch.testing.assert_close(mixed["weight"], torch.tensor([1.1]), rtol=0, atol=1e-7)
    assert mixed["steps"].tolist() == [3]


@pytest.mark.parametrize(
    ("tuned", "alpha", "words"),
    [
        ({"weight": torch.zeros(2)}, 1.5, "alpha is 1.5; expected 0"),
        ({"weight": torch.zeros(2)}, float("nan"), "alpha is nan"),
        ({"weight": torch.zeros(3)}, 0.5, "differ in 'weight'"),
        ({"weight": torch.zeros(2), "bias": torch.zeros(2)}, 0.5, "differ in 'bias'"),
        ({}, 0.5, "differ in 'weight'"),
    ],
)
def test_what_does_not_fit_is_refused(tuned, alpha, words):
    with pytest.raises(ValueError, match=words):
        interpolate({"weight": torch.ones(2)}, tuned, alpha)


def test_each_alpha_is_measured_as_the_model_it_gives(base, prepared, facades, colours):
    model, processor = base
    validation = load_prepared(prepared)["validation"]
    tuned = perturbed(model, 0.3)
    colours = colours.select(range(0, len(colours), 5))
    prompts, retention = facades.canonical_prompts, (colours, facades.retention.canonical_prompts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alpha, table = choose_alpha(
        model, tuned, processor, validation, prompts, retention, (0, 0.5, 1)
    )
    assert [row["alpha"] for row in table] == [0, 0.5, 1]
    middle = copy.deepcopy(model)
    middle.load_state_dict(interpolate(model.state_dict(), tuned.state_dict(), 0.5))
    assert len({row["nll"] for row in table}) == 3
    for row, same in zip(table, (model, middle, tuned), strict=True):
        assert row["accuracy"]["value"] == asked(same, processor, validation, prompts)
        assert row["retention"]["value"] == asked(same, processor, *retention)
    counts = table[0]["accuracy"]["n"], table[0]["retention"]["n"]
    assert counts == (len(validation), len(colours))
    assert alpha in {row["alpha"] for row in table}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_mixture_costs_no_more_retention_than_is_allowed(base, prepared, facades, colours):
    """The worse model of the domain is the one that is right on the other task: it answers it."""
    model, processor = base
    worse, validation = perturbed(model, 0.6), load_prepared(prepared)["validation"]
    colours = colours.select(range(0, len(colours), 5))
    prompts = facades.retention.canonical_prompts
    embeds = encode_images(
        worse, processor, (row["image"] for row in colours), len(colours), progress=False
    )
    answers = zero_shot_logits(worse, embeds, encode_texts(worse, processor, prompts)).argmax(1)
    answered = colours.remove_columns("label").add_column("label", answers.tolist())
    asking = processor, validation, facades.canonical_prompts, (answered, prompts)
    for drop in (1.0, 0.2, 0.0):
        chosen, table = choose_alpha(worse, model, *asking, (0, 0.5, 1), retention_drop=drop)
        kept = {row["alpha"]: row["retention"]["value"] for row in table}
        assert kept[0] == 1.0 and kept[1] < 0.8
        allowed = [row for row in table if kept[row["alpha"]] >= 1 - drop]
        assert chosen == min(allowed, key=lambda row: row["nll"])["alpha"]
    assert chosen == 0 and table[2]["nll"] < table[0]["nll"]


def test_of_equals_the_one_nearest_to_the_base_is_chosen(base, prepared, facades):
    model, processor = base
    validation = load_prepared(prepared)["validation"]
    prompts = facades.canonical_prompts
    alpha, table = choose_alpha(model, model, processor, validation, prompts, alphas=(1, 0.5, 0.25))
    assert (alpha, len({row["accuracy"]["value"] for row in table})) == (0.25, 1)
    assert table[0]["retention"] is None


def test_a_destroyed_model_is_not_chosen(base, prepared, facades):
    model, processor = base
    destroyed = type(model)(model.config).eval()
    validation = load_prepared(prepared)["validation"]
    asking = processor, validation, facades.canonical_prompts
    alpha, table = choose_alpha(model, destroyed, *asking, alphas=(0, 0.7, 1))
    assert alpha == 0
    assert table[0]["nll"] < table[-1]["nll"]


def test_the_views_of_large_photos_are_those_of_the_processor(base, prepared, facades):
    """Oblong ones too: resized and cropped once, then seen as `encode_images` sees the photo."""
    model, processor = base
    validation = load_prepared(prepared)["validation"].select(range(24))
    sizes = [(140, 200), (301, 128), (96, 97)]
    large = validation.map(
        lambda row, index: {"image": row["image"].resize(sizes[index % 3])}, with_indices=True
    )
    _, (row,) = choose_alpha(model, model, processor, large, facades.canonical_prompts, alphas=(0,))
    assert row["accuracy"]["value"] == asked(model, processor, large, facades.canonical_prompts)


def test_the_shipped_retention_task_is_even_repeatable_and_known_to_the_base(
    base, facades, colours, tmp_path
):
    assert colours.features["label"].names == list(facades.retention.classes)
    assert np.bincount(colours["label"]).tolist() == [40] * len(facades.retention.classes)
    again, other = (retention_rows(facades, tmp_path / str(seed), seed) for seed in (0, 1))
    for one, two in zip(colours, again, strict=True):
        assert one["image"].tobytes() == two["image"].tobytes()
    assert colours[0]["image"].tobytes() != other[0]["image"].tobytes()
    images = (row["image"] for row in colours)
    prompts = facades.retention.canonical_prompts
    measure = retention_accuracy(*base, images, np.array(colours["label"]), prompts, progress=False)
    assert (measure.n, measure.split) == (240, "retention")
    assert measure.low > 0.6  # by chance 0.17


def photos(facades: Domain, folder, **changes) -> Domain:
    """The façades with a retention task of cats and dogs: noise in class folders, one broken."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(6):
                noise = Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8))
                noise.save(folder / split / name / f"{index}.png")
    (folder / "test" / "dog" / "2.png").write_bytes(b"no image")
    retention = {
        "title": "Pets",
        "source": {"kind": "folder", "path": str(folder)},
        "classes": {"cat": ["a photo of a cat"], "dog": ["a photo of a dog"]},
    }
    return Domain.model_validate(facades.model_dump() | {"retention": retention | changes})


def test_folders_give_their_test_split_without_what_is_broken(facades, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = retention_rows(photos(facades, tmp_path), tmp_path / "drawn")
    assert rows["label"][:] == [0] * 6 + [1] * 5
    assert rows[0]["image"].size == (60, 50)
    assert "left out 1 unreadable images of 'dog'" in caplog.text


def test_no_more_are_drawn_than_asked_for(facades, tmp_path):
    rows = retention_rows(photos(facades, tmp_path, images_per_class=3), tmp_path / "drawn")
    assert rows["label"][:3] == [0] * 3 and len(rows) <= 6


def test_a_dataset_gives_the_same(facades, colours, tmp_path):
    colours.to_parquet(tmp_path / "colours.parquet")
    source = {"kind": "dataset", "path": str(tmp_path / "colours.parquet")}
    retention = facades.retention.model_dump() | {"source": source}
    domain = Domain.model_validate(facades.model_dump() | {"retention": retention})
    rows = retention_rows(domain, tmp_path / "drawn")
    assert rows["label"][:] == colours["label"][:]
    assert rows[7]["image"].tobytes() == colours[7]["image"].tobytes()


def test_what_can_not_be_asked_is_named(facades, tmp_path):
    without = facades.model_copy(update={"retention": None})
    with pytest.raises(ValueError, match="no retention task; add `retention`"):
        retention_rows(without, tmp_path)
    circles = facades.retention.model_dump() | {"classes": {"red": ["red"], "circle": ["a circle"]}}
    domain = Domain.model_validate(facades.model_dump() | {"retention": circles})
    with pytest.raises(ValueError, match="no shape is 'circle'.*red, pink"):
        retention_rows(domain, tmp_path / "drawn")
    task = photos(facades, tmp_path)
    for path in (tmp_path / "test" / "dog").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image of the retention class 'dog' can be read"):
        retention_rows(task, tmp_path / "drawn")
