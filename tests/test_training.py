"""Stages train what they name and nothing else; a run can be interrupted."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from nicheclip.domain import Domain, Stage
from nicheclip.stages import trainable_names
from nicheclip.trainer import StagedTrainingArguments
from nicheclip.zero_shot import load_clip
from tests.conftest import FACADES


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every checkpoint kept: one epoch of the text stage, two of the visual stage."""
    copy = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared / "data", copy / "data")
    shutil.copy(prepared / "domain.yaml", copy)
    train.train([str(copy), "--save_total_limit", "9", "--early_stopping_patience", "9"])
    return copy


@pytest.fixture(scope="module")
def base(domain: Domain) -> dict[str, torch.Tensor]:
    return dict(load_clip(domain.base)[0].state_dict())


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_stage_one_leaves_the_visual_tower_bit_identical(trained, base, domain):
    after = weights(checkpoints(trained)[0])
    changed = moved(base, after)
    assert not {name for name in changed if name.startswith("vision_model.")}
    assert changed == set(trainable_names(base, domain.stages[0]))


def test_stage_two_moves_exactly_the_named_blocks_besides(trained, base, domain):
    first, *_, last = checkpoints(trained)
    blocks = {".".join(name.split(".")[:4]) for name in moved(weights(first), weights(last)) if "vision_model" in name}
    assert blocks == {"vision_model.encoder.layers.2", "vision_model.encoder.layers.3"}
    assert moved(weights(first), weights(last)) == set(trainable_names(base, domain.stages[1]))


def test_the_optimiser_holds_only_what_trains(trained, base, domain):
    first, *_, last = checkpoints(trained)
    for checkpoint, stage in ((first, domain.stages[0]), (last, domain.stages[1])):
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        names = trainable_names(base, stage)
        assert len(state["state"]) == len(names)
        decayed, spared = state["param_groups"]
        assert len(decayed["params"]) == sum(base[name].ndim > 1 for name in names)
        assert len(spared["params"]) == sum(base[name].ndim <= 1 for name in names)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_each_stage_has_its_own_schedule(trained, domain):
    state = json.loads((checkpoints(trained)[-1] / "trainer_state.json").read_text())
    text, first, last = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    assert text < 0.1 * domain.stages[0].learning_rate, "the first stage decays to its end"
    assert first > 0.3 * domain.stages[1].learning_rate, "the second stage begins a schedule of its own"
    assert last < 0.1 * domain.stages[1].learning_rate


def test_the_record_names_the_best_epoch_and_the_stages(trained):
    record = json.loads((trained / "training.json").read_text())
    assert [row["stage"] for row in record["epochs"]] == ["text", "visual", "visual"]
    best = max(record["epochs"], key=lambda row: row["eval_accuracy"])
    assert record["best_epoch"] == best["epoch"]
    kept = weights(trained / "model")
    assert not moved(kept, weights(checkpoints(trained)[best["epoch"] - 1]))


@pytest.mark.parametrize("index", [0, 1], ids=["at the boundary of the stages", "inside the second stage"])
def test_resuming_gives_the_same_weights(trained, tmp_path, index):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("model"))
    for checkpoint in checkpoints(copy)[index + 1 :]:
        shutil.rmtree(checkpoint)
    train.train(
        [str(copy), "--save_total_limit", "9", "--early_stopping_patience", "9", "--resume_from_checkpoint", "True"]
    )
    assert not moved(weights(checkpoints(trained)[-1]), weights(checkpoints(copy)[-1]))


def test_logit_scale_is_clamped(prepared, tmp_path, domain):
    copy = tmp_path / "run"
    shutil.copytree(prepared / "data", copy / "data")
    hot, processor = load_clip(domain.base)
    with torch.no_grad():
        hot.logit_scale.fill_(math.log(100) - 1e-4)
    hot.save_pretrained(tmp_path / "hot")
    processor.save_pretrained(tmp_path / "hot")
    domain.model_copy(update={"base": str(tmp_path / "hot")}).save(copy / "domain.yaml")
    report = json.loads((copy / "data" / "report.json").read_text())
    (copy / "data" / "report.json").write_text(json.dumps(report | {"base": str(tmp_path / "hot")}))
    trainer = train.train([str(copy), "--loss", "info_nce"])
    assert trainer.model.logit_scale.item() <= math.log(100) + 1e-6


def test_an_unfinished_training_is_not_thrown_away(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "training.json").unlink()
    with pytest.raises(ValueError, match="go on with --resume_from_checkpoint True"):
        train.train([str(copy)])
    assert len(checkpoints(copy)) == len(checkpoints(trained))


def test_resuming_on_data_that_was_prepared_anew_is_refused(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "checkpoints" / "data.json").write_text('{"fingerprint": "another"}')
    with pytest.raises(ValueError, match="prepared anew"):
        train.train([str(copy), "--resume_from_checkpoint", "True"])


def test_a_finished_training_makes_room_for_a_new_one(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    stale = copy / "checkpoints" / "checkpoint-999999"
    shutil.copytree(checkpoints(trained)[0], stale)
    (copy / "checkpoints" / "notes.txt").write_text("mine")
    train.train([str(copy), "--save_total_limit", "9", "--early_stopping_patience", "9"])
    assert not stale.exists()
    assert (copy / "checkpoints" / "notes.txt").exists()
    assert not moved(weights(checkpoints(copy)[-1]), weights(checkpoints(trained)[-1])), "same seed, same weights"


def test_stage_patterns_that_match_nothing_are_refused(base):
    stage = Stage(name="typo", epochs=1, learning_rate=1e-5, train=["text_modell.*"])
    with pytest.raises(ValueError, match="'text_modell.*' matches no parameter"):
        trainable_names(base, stage)
    stage = Stage(name="deep", epochs=1, learning_rate=1e-5, train=["logit_scale"], last_visual_blocks=99)
    with pytest.raises(ValueError, match="has 4 blocks"):
        trainable_names(base, stage)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 1e-3}, "belong to the stages"),
        ({"num_train_epochs": 2}, "belong to the stages"),
        ({"loss": "triplet"}, "expected one of multi_positive, info_nce"),
        ({"save_strategy": "no"}, "use 'epoch' or 'steps'"),
        ({"logging_strategy": "steps"}, "epochs are compared"),
        ({"load_best_model_at_end": False}, "the best epoch on validation is kept"),
    ],
)
def test_arguments_that_would_mislead_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        StagedTrainingArguments(output_dir=str(tmp_path), **options)


def test_data_prepared_for_another_base_is_refused(prepared, tmp_path, domain):
    copy = tmp_path / "run"
    shutil.copytree(prepared / "data", copy / "data")
    domain.model_copy(update={"base": str(tmp_path)}).save(copy / "domain.yaml")
    with pytest.raises(ValueError, match="run `python -m data_prep` again"):
        train.train([str(copy)])


def test_an_unknown_training_key_is_named(domain, tmp_path):
    broken = domain.model_copy(update={"training": {"batchsize": 3}})
    with pytest.raises(ValueError, match="unknown key 'batchsize'"):
        train.parse_arguments(broken, tmp_path, [])


def test_the_command_line_goes_before_the_domain_file(domain, tmp_path):
    assert train.parse_arguments(domain, tmp_path, []).per_device_train_batch_size == 24
    options = ["--per_device_train_batch_size", "7", "--loss", "info_nce"]
    args = train.parse_arguments(domain, tmp_path, options)
    assert (args.per_device_train_batch_size, args.loss) == (7, "info_nce")


def test_without_an_argument_the_facades_are_meant():
    assert train.locate(train.DEFAULT_DOMAIN) == (Domain.load(FACADES), Path("runs/facades"))
