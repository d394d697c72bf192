"""A domain file is checked, and a wrong one says what to mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nicheclip.domain import Domain, DomainError
from tests.conftest import ROOT


def minimal() -> dict:
    return {
        "name": "birds",
        "title": "Birds",
        "description": "Two birds.",
        "base": "openai/clip-vit-base-patch32",
        "classes": {
            "wren": ["a photo of a wren", "a small brown bird"],
            "robin": ["a photo of a robin"],
        },
        "clusters": {"garden": ["wren", "robin"]},
        "stages": [{"name": "text", "epochs": 1, "learning_rate": 1e-5, "train": ["text_model.*"]}],
        "gates": {"accuracy": 0.9},
    }


def load(tmp_path: Path, raw: dict | str) -> Domain:
    path = tmp_path / "domain.yaml"
    text = raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return Domain.load(path)


def test_a_minimal_file_loads_and_survives_saving(tmp_path):
    domain = load(tmp_path, minimal())
    assert domain.class_names == ["wren", "robin"]
    assert domain.canonical_prompts == ["a photo of a wren", "a photo of a robin"]
    assert domain.prompt_bank[1] == [0, 0, 1]
    domain.save(tmp_path / "copy.yaml")
    assert Domain.load(tmp_path / "copy.yaml") == domain


@pytest.mark.parametrize("name", ["architecture", "facades"])
def test_shipped_domains_load_with_five_prompts_a_class(name):
    domain = Domain.load(ROOT / "domains" / name)
    assert all(len(prompts) == 5 for prompts in domain.classes.values())
    assert len(domain.gates) == 6
    assert [stage.name for stage in domain.stages] == ["head", "visual", "text"]


def test_architecture_is_of_the_articles_size():
    domain = Domain.load(ROOT / "domains" / "architecture")
    assert (len(domain.classes), len(domain.clusters)) == (25, 10)
    assert domain.base == "openai/clip-vit-base-patch32"


def broken(**changes) -> dict:
    return minimal() | changes


def retention(**changes) -> dict:
    task = {
        "title": "Pets",
        "source": {"path": "pets"},
        "classes": {"cat": ["a cat"], "dog": ["a dog"]},
    }
    return broken(retention=task | changes)


def test_a_retention_task_is_optional_and_survives_saving(tmp_path):
    assert load(tmp_path, minimal()).retention is None
    domain = load(tmp_path, retention())
    assert domain.retention.canonical_prompts == ["a cat", "a dog"]
    domain.save(tmp_path / "copy.yaml")
    assert Domain.load(tmp_path / "copy.yaml") == domain


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (broken(clusters={"garden": ["wren"]}), ["clusters", "'robin' is in no cluster"]),
        (
            broken(clusters={"a": ["wren", "robin"], "b": ["robin"]}),
            ["'robin' is in 'a' and in 'b'", "keep"],
        ),
        (
            broken(clusters={"garden": ["wren", "robbin"]}),
            ["'robbin' in 'garden' is no class", "did you mean 'robin'"],
        ),
        (
            broken(classes={"wren": ["a wren"], "robin": ["  "]}),
            ["classes.robin.0", "expected some text", "'  '"],
        ),
        (broken(classes={"wren": ["a wren"], "robin": []}), ["classes.robin", "at least 1 item"]),
        (
            broken(classes={"wren": ["a bird"], "robin": ["a bird"]}),
            ["'a bird' is in both", "reword"],
        ),
        (broken(classes={"wren": ["a"], "Wren": ["b"]}), ["duplicate class", "'Wren'"]),
        (broken(classes={"wren": ["a wren"]}), ["at least 2 items"]),
        (broken(learning_rate=1), ["unknown key 'learning_rate'"]),
        (broken(gates={"acuracy": 0.9}), ["gates", "acuracy", "accuracy"]),
        (broken(splits={"test": 0.9, "validation": 0.2}), ["splits", "leaves nothing to train on"]),
        (broken(splits={"test": 2.5}), ["splits.test", "2.5", "whole number"]),
        (broken(stages=[]), ["stages"]),
        (
            broken(stages=[{"name": "s", "epochs": 1, "learning_rate": -1, "train": ["x"]}]),
            ["learning_rate", "-1"],
        ),
        (
            broken(stages=[{"name": "s", "epochs": 1, "lr": 1, "train": ["x"]}]),
            ["unknown key 'stages.0.lr'", "missing"],
        ),
        (broken(name="Big Birds"), ["name", "lower-case", "'Big Birds'"]),
        (
            broken(augmentation={"crop_scale": [0.9, 0.5]}),
            ["augmentation.crop_scale", "smallest <= largest"],
        ),
        (retention(classes={"cat": ["a cat"]}), ["retention.classes", "at least 2 items"]),
        (retention(classes={"cat": ["a cat"], "dog": []}), ["classes.dog", "at least 1 item"]),
        (
            retention(classes={"cat": ["a cat"], "dog": [" "]}),
            ["retention.classes.dog.0", "expected some text"],
        ),
        (retention(titel="Pets"), ["unknown key 'retention.titel'", "did you mean 'title'"]),
        (
            retention(source={"pth": "pets"}),
            ["unknown key 'retention.source.pth'", "did you mean 'path'"],
        ),
        (retention(source={"kind": "commons"}), ["retention.source.kind", "'commons'"]),
        (
            retention(source={"kind": "folder"}),
            ["missing key 'retention.source.path'"],
        ),
        (retention(images_per_class=0), ["retention.images_per_class", "0"]),
        (
            broken(retention={"title": "Pets"}),
            ["missing key 'retention.source'", "missing key 'retention.classes'"],
        ),
        (broken(source={"kind": "facades"}), ["source.kind", "'module'", "'facades'"]),
        (broken(source={"kind": "module"}), ["source", "no path; give the module that draws"]),
        ("classes: [", ["not valid YAML"]),
        ("just words", ["holds a str"]),
        ("name: a\nname: b\n", ["duplicate key 'name'"]),
        ("classes:\n  wren: [a]\n  wren: [b]\n", ["duplicate key 'wren'", "line"]),
    ],
)
def test_a_wrong_file_names_key_value_and_remedy(tmp_path, raw, words):
    with pytest.raises(DomainError) as caught:
        load(tmp_path, raw)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DomainError, match="no domain file at"):
        Domain.load(tmp_path / "nowhere.yaml")


def test_the_base_may_lie_beside_the_file(tmp_path):
    (tmp_path / "base").mkdir()
    assert load(tmp_path, minimal() | {"base": "base"}).base == str(tmp_path / "base")


def test_the_article_is_a_variant_of_architecture():
    folder = ROOT / "domains" / "architecture"
    ours, article = Domain.load(folder), Domain.load(folder / "article.yaml")
    own, theirs = ours.model_dump(), article.model_dump()
    changed = {key for key in own if own[key] != theirs[key]}
    assert {"name", "title", "quality_filter", "training"} <= changed
    assert changed <= {
        "name",
        "title",
        "quality_filter",
        "training",
        "stages",
        "recipe",
        "evaluation",
    }
    stages = [(each.epochs, each.learning_rate, each.loss) for each in article.stages]
    assert stages == [([5], [5e-6], "info_nce"), ([10], [5e-7], "info_nce")]
    assert article.stages[0].logit_scale == pytest.approx(1 / 0.07, abs=1e-4)
    assert article.training["per_device_train_batch_size"] == 16


def test_a_hard_negative_gate_needs_a_cluster_of_two(tmp_path):
    raw = minimal() | {"clusters": {"a": ["wren"], "b": ["robin"]}}
    raw["gates"] = {"hard_negative_pass_rate": 0.8}
    with pytest.raises(DomainError, match="nothing is a hard negative; remove the gate"):
        load(tmp_path, raw)
