"""Stages train what they name and nothing else; a run can be interrupted."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

import train
from nicheclip.clip import load_clip
from nicheclip.domain import Domain, Stage
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import TrainingInterrupted
from nicheclip.training.checkpoints import is_over
from nicheclip.training.losses import LOSSES, multi_positive
from nicheclip.training.stages import check_stages, trainable_names
from tests.conftest import FACADES


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a model, or what a checkpoint holds of one, without the average."""
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    saved = load_file(folder / "trained.safetensors")
    return {name.removeprefix("weights.clip."): part for name, part in saved.items()}


def checkpoints(run: Path) -> list[Path]:
    """In the order in which they were written."""
    found = (run / "checkpoints").glob("*/checkpoint-*")
    return sorted(found, key=lambda path: (path.parent.name, int(path.name.split("-")[1])))


KEEP_ALL = ["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "99"]


def fresh(run: Path, folder: Path, **changes) -> Path:
    """A run directory of its own in `folder`, with the data of another and a changed domain."""
    copy = folder / "run"
    shutil.copytree(run / "data", copy / "data")
    Domain.load(run).model_copy(update=changes).save(copy / "domain.yaml")
    return copy


def without_model(run: Path, copy: Path) -> Path:
    return shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model"))


def record_of(run: Path) -> dict:
    return json.loads((run / "training.json").read_text())


def samples_per_epoch(run: Path) -> int:
    counts = json.loads((run / "data" / "report.json").read_text())["counts"]
    return counts["train_samples_per_epoch"]


TEXT_SIDE = ["text_model.*", "text_projection.*", "visual_projection.*", "logit_scale"]
FACTS = {"train": TEXT_SIDE, "keep": "best", "loss": "multi_positive"}
TWO_STAGES = [
    Stage(name="text", epochs=1, learning_rate=3e-4, **FACTS),
    Stage(name="visual", epochs=2, learning_rate=5e-6, last_visual_blocks=2, **FACTS),
]


@pytest.fixture(scope="module")
def prepared(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two stages that keep their best epoch, as the recipe `text_first` has them."""
    return fresh(prepared, tmp_path_factory.mktemp("two_stages"), stages=TWO_STAGES)


@pytest.fixture(scope="module")
def domain(prepared: Path) -> Domain:
    return Domain.load(prepared)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of the text stage, two of the visual one, 7 steps each.

    Checkpoints every 3 steps and after epochs.
    """
    copy = fresh(prepared, tmp_path_factory.mktemp("trained"))
    train.train([str(copy), *KEEP_ALL])
    return copy


@pytest.fixture(scope="module")
def base(domain: Domain) -> dict[str, torch.Tensor]:
    return dict(load_clip(domain.base)[0].state_dict())


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() ^ after.keys() <= {"weights.used"}
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_checkpoint_is_written_every_few_steps_and_after_each_epoch(trained):
    found = [f"{path.parent.name}/{path.name.split('-')[1]}" for path in checkpoints(trained)]
    visual = [f"2-visual/{step}" for step in (3, 6, 7, 9, 12, 14)]
    assert found == ["1-text/3", "1-text/6", "1-text/7", *visual]


TABLE = "text_model.embeddings.token_embedding.weight"


def test_a_checkpoint_holds_what_its_stage_trains(trained, base, domain):
    for checkpoint, stage in ((2, domain.stages[0]), (-1, domain.stages[1])):
        named = set(trainable_names(base, stage))
        held = weights(checkpoints(trained)[checkpoint])
        assert held.keys() - {"weights.used"} == named - {TABLE}, "tokens that prompts use"
        assert moved({name: base[name] for name in named - {TABLE}}, held) == named - {TABLE}


def test_a_stage_trains_exactly_what_it_names(prepared, base, domain, tmp_path):
    for index, stage in enumerate(domain.stages):
        run = fresh(prepared, tmp_path / str(index), stages=[stage])
        train.train([str(run)])
        changed = moved(base, weights(run / "model"))
        assert changed == set(trainable_names(base, stage))
        blocks = {name.split(".")[3] for name in changed if name.startswith("vision_model.")}
        assert blocks == ({"2", "3"} if index else set())


def test_the_optimiser_holds_only_what_trains(trained, base, domain):
    for checkpoint, stage in ((2, domain.stages[0]), (-1, domain.stages[1])):
        path = checkpoints(trained)[checkpoint]
        state = torch.load(path / "optimizer.pt", weights_only=True)
        names = trainable_names(base, stage)
        assert len(state["state"]) == len(names)
        decayed, spared = state["param_groups"]
        assert len(decayed["params"]) == sum(base[name].ndim > 1 for name in names)
        assert len(spared["params"]) == sum(base[name].ndim <= 1 for name in names)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_any_number_of_stages_each_moves_what_it_names(prepared, base, tmp_path):
    trained = {"scale": "logit_scale", "block": "vision_model.encoder.layers.0.*"}
    trained["projections"] = "*_projection.*"
    stages = [
        Stage(name=name, epochs=1, learning_rate=1e-4, train=[pattern], warmup=0.5)
        for name, pattern in trained.items()
    ]
    run = fresh(prepared, tmp_path, stages=stages)
    train.train([str(run), "--save_total_limit", "99"])
    named = [set(trainable_names(base, stage)) for stage in stages]
    for checkpoint, names in zip(checkpoints(run), named, strict=True):
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert weights(checkpoint).keys() - {"weights.used"} == names
        assert len(state) == len(names)
    assert moved(base, weights(run / "model")) == set.union(*named)


def test_each_stage_has_its_own_schedule(trained, domain):
    files = [checkpoints(trained)[index] / "trainer_state.json" for index in (2, -1)]
    logs = [json.loads(path.read_text())["log_history"] for path in files]
    text, first, last = [entry["learning_rate"] for log in logs for entry in log if "loss" in entry]
    rates = [stage.learning_rate[0] for stage in domain.stages]
    assert text < 0.1 * rates[0], "the first stage decays to its end"
    assert first > 0.3 * rates[1], "the second begins one of its own"
    assert last < 0.1 * rates[1]


def test_the_record_names_the_stages(trained):
    stages = [row["stage"] for row in record_of(trained)["epochs"]]
    assert stages == ["text", "visual", "visual"]


def test_the_best_epoch_on_validation_is_kept(trained):
    text, *visual = record_of(trained)["epochs"]
    best = max((text, *visual), key=lambda row: row["eval_accuracy"])
    assert text["kept"]
    assert [row["kept"] for row in visual] == [row is best for row in visual]
    stage = "2-visual" if best["stage"] == "visual" else "1-text"
    kept = weights(trained / "checkpoints" / stage / f"checkpoint-{best['step']}")
    model = weights(trained / "model")
    assert not moved({name: model[name] for name in kept if name in model}, kept)


def test_the_record_tells_how_batches_were_composed(trained):
    batches = record_of(trained)["stages"][1]["batches"]
    assert (batches["batches"], batches["samples"]) == (7, 7 * 24)
    assert batches["distinct"] == samples_per_epoch(trained)
    assert 0 < batches["same_class_pairs"] < batches["hard_pairs"] < 1


def test_no_pickle_of_arguments_is_written(trained):
    assert not list(trained.rglob("training_args.bin"))


@pytest.mark.parametrize("kept", [1, 3, 5, 6, 8])
def test_resuming_from_any_checkpoint_gives_the_same_weights(trained, tmp_path, kept):
    copy = without_model(trained, tmp_path / "run")
    for checkpoint in checkpoints(copy)[kept:]:
        shutil.rmtree(checkpoint)
    train.train([str(copy), *KEEP_ALL, "--resume_from_checkpoint", "True"])
    assert not moved(weights(checkpoints(trained)[-1]), weights(checkpoints(copy)[-1]))
    assert not moved(weights(trained / "model"), weights(copy / "model"))


def test_resuming_a_finished_training_gives_the_same_model(trained, tmp_path):
    copy = without_model(trained, tmp_path / "run")
    train.train([str(copy), *KEEP_ALL, "--resume_from_checkpoint", str(checkpoints(copy)[-1])])
    assert not moved(weights(trained / "model"), weights(copy / "model"))


def test_a_checkpoint_without_state_is_passed_over(trained, tmp_path, caplog):
    copy = without_model(trained, tmp_path / "run")
    last = checkpoints(copy)[-1]
    (last / "trainer_state.json").write_text('{"best_glob')
    (last / "trained.safetensors").write_bytes(b"half")
    train.train([str(copy), *KEEP_ALL, "--resume_from_checkpoint", "True"])
    assert "unfinished" in caplog.text
    assert not moved(weights(trained / "model"), weights(copy / "model"))


def test_a_stage_without_progress_ends_early_and_the_next_goes_on(prepared, tmp_path):
    still, _ = Domain.load(prepared).stages
    stages = [
        still.model_copy(update={"epochs": [4], "learning_rate": [1e-12]}),
        still.model_copy(update={"name": "last"}),
    ]
    run = fresh(prepared, tmp_path, stages=stages)
    train.train([str(run), "--early_stopping_patience", "1"])
    assert [row["stage"] for row in record_of(run)["epochs"]] == ["text", "text", "last"]


@pytest.mark.parametrize(
    ("step", "best", "over"),
    [(20, None, True), (19, None, False), (30, 10, True), (29, 10, False), (40, 30, True)],
)
def test_a_stage_is_over_after_its_epochs_or_without_progress(step, best, over):
    """Of 40 steps, 10 an epoch, with a patience of two epochs, which count within the stage."""
    state = TrainerState(global_step=step, best_global_step=best, max_steps=40, num_train_epochs=4)
    stage = Stage(name="any", epochs=4, learning_rate=1, **FACTS)
    assert is_over(state, stage, 2) is over
    to_the_end = stage.model_copy(update={"keep": "last"})
    assert is_over(state, to_the_end, 2) is (step == 40)


@pytest.mark.parametrize("loss", ["info_nce", "class_prompts"])
def test_other_losses_train_and_resume_with_workers(prepared, tmp_path, loss):
    """In the middle of an epoch, and of an accumulated step, with views that workers draw."""
    stages = [stage.model_copy(update={"loss": loss}) for stage in Domain.load(prepared).stages]
    options = [*KEEP_ALL]
    options += ["--per_device_train_batch_size", "12", "--gradient_accumulation_steps", "2"]
    run = fresh(prepared, tmp_path / "whole", stages=stages)
    train.train([str(run), *options])
    losses = [row["loss"] for row in record_of(run)["epochs"]]
    assert losses[-1] < losses[0]
    copy = without_model(run, tmp_path / "resumed")
    for checkpoint in checkpoints(copy)[4:]:
        shutil.rmtree(checkpoint)
    options += ["--dataloader_num_workers", "2", "--dataloader_prefetch_factor", "2"]
    train.train([str(copy), *options, "--resume_from_checkpoint", "True"])
    assert not moved(weights(checkpoints(run)[-1]), weights(checkpoints(copy)[-1]))


def test_accumulating_is_a_larger_batch_for_class_prompts(prepared, base, tmp_path):
    """It has no in-batch negatives: an epoch at once and in two halves give the same step."""
    stage, samples, results = Domain.load(prepared).stages[0], samples_per_epoch(prepared), []
    stage = stage.model_copy(update={"warmup": 0, "loss": "class_prompts"})
    for name, parts in (("at once", 1), ("in halves", 2)):
        run = fresh(prepared, tmp_path / name, stages=[stage])
        # Adam's first step is the rate wherever the gradient is not tiny, so a large eps makes it
        # show the gradient
        options = "--adam_epsilon 1 --weight_decay 0 --max_grad_norm 0"
        options += f" --cluster_share 0 --per_device_train_batch_size {samples // parts}"
        options += f" --gradient_accumulation_steps {parts}"
        train.train([str(run), *options.split()])
        (checkpoint,) = checkpoints(run)
        assert checkpoint.name == "checkpoint-1"
        results.append(weights(run / "model"))
    once, halves = results
    assert max((once[name] - base[name]).abs().max() for name in once) > 1e-6
    for name in once:
        steps = halves[name] - base[name], once[name] - base[name]
        torch.testing.assert_close(*steps, rtol=0.02, atol=2e-7)


def test_gradient_checkpointing_changes_nothing_but_memory(prepared, tmp_path):
    results = []
    for name, asked in (("plain", "False"), ("checkpointed", "True")):
        run = fresh(prepared, tmp_path / name, stages=Domain.load(prepared).stages[1:])
        trainer = train.train([str(run), "--gradient_checkpointing", asked])
        assert str(trainer.model.is_gradient_checkpointing) == asked
        results.append(weights(run / "model"))
    assert not moved(*results)


def test_bfloat16_trains_and_keeps_float32_weights(trained, prepared, tmp_path):
    run = fresh(prepared, tmp_path)
    train.train([str(run), "--bf16", "True"])
    record = record_of(run)
    assert record["settings"]["precision"] == "bf16"
    assert record["epochs"][-1]["loss"] < record["epochs"][0]["loss"]
    assert {tensor.dtype for tensor in weights(run / "model").values()} == {torch.float32}
    assert moved(weights(trained / "model"), weights(run / "model")), "rounded otherwise"


@pytest.mark.parametrize("limit", ["1.0", "0"], ids=["seen in the gradient", "seen in the loss"])
def test_what_is_not_finite_stops_with_step_images_and_remedy(prepared, tmp_path, limit):
    stage = Domain.load(prepared).stages[0]
    stage = stage.model_copy(update={"learning_rate": [1e30], "warmup": 0})
    run = fresh(prepared, tmp_path, stages=[stage])
    told = r"(?s)at step \d, in stage 'text'; remove.*train/.*\.(jpg|png)"
    with pytest.raises(FloatingPointError, match=told):
        train.train([str(run), "--max_grad_norm", limit])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_from_which_the_same_weights_come(
    trained, prepared, tmp_path, monkeypatch, number
):
    """The signal arrives in the middle of the second stage's first epoch, from the loss."""
    steps, handler = iter(range(99)), signal.getsignal(signal.SIGINT)

    def pressing(*args):
        if next(steps) == 9:
            signal.raise_signal(number)
        return multi_positive(*args)

    run = fresh(prepared, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(LOSSES, "multi_positive", pressing)
        with pytest.raises(TrainingInterrupted, match=rf"{number.name}.*2-visual/checkpoint-3"):
            train.train([str(run)])
    assert checkpoints(run)[-1].name == "checkpoint-3"
    assert not (run / "model").exists()
    train.train([str(run), "--resume_from_checkpoint", "True"])
    assert not moved(weights(trained / "model"), weights(run / "model"))
    assert signal.getsignal(signal.SIGINT) is handler


def test_wise_ft_mixes_the_base_in_and_tells_of_each_mixture(trained, base, prepared, tmp_path):
    run = fresh(prepared, tmp_path)
    train.train([str(run), "--wise_ft", "0.5"])
    tuned, mixed = weights(trained / "model"), weights(run / "model")
    for name in mixed:
        torch.testing.assert_close(mixed[name], (base[name] + tuned[name]) / 2)
    record = record_of(run)["wise_ft"]
    assert [row["alpha"] for row in record["mixtures"]] == [0, 0.5, 1]
    assert all(0.3 < row["retention"]["value"] <= 1 for row in record["mixtures"])


def test_logit_scale_is_clamped(prepared, tmp_path, domain):
    text, _ = domain.stages
    fast = text.model_copy(update={"learning_rate": [10.0], "logit_scale": 99.0, "warmup": 0})
    run = fresh(prepared, tmp_path, stages=[fast.model_copy(update={"train": ["logit_scale"]})])
    trainer = train.train([str(run), "--adam_beta2", "0.5"])
    assert trainer.model.logit_scale.exp().item() <= 100 + 1e-4


def test_an_unfinished_training_is_not_thrown_away(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "training.json").unlink()
    with pytest.raises(ValueError, match="go on with --resume_from_checkpoint True"):
        train.train([str(copy)])
    assert len(checkpoints(copy)) == len(checkpoints(trained))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--per_device_train_batch_size", "12"], "batch_size was 24 and is 12 now"),
        (["--seed", "7"], "seed was 42 and is 7 now"),
    ],
)
def test_resuming_with_other_settings_is_refused(trained, tmp_path, options, words):
    copy = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        train.train([str(copy), *options, "--resume_from_checkpoint", "True"])
    assert (copy / "training.json").exists(), "nothing is lost"


def test_resuming_with_other_prompts_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    domain = Domain.load(copy)
    reworded = domain.classes | {"gothic": ["another word", *domain.classes["gothic"]]}
    domain.model_copy(update={"classes": reworded}).save(copy / "domain.yaml")
    with pytest.raises(ValueError, match="classes has changed"):
        train.train([str(copy), "--resume_from_checkpoint", "True"])


def test_resuming_on_data_that_was_prepared_anew_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    begun = copy / "checkpoints" / "begun.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"data_fingerprint": "another"}))
    with pytest.raises(ValueError, match="data_fingerprint was another"):
        train.train([str(copy), "--resume_from_checkpoint", "True"])


def test_resuming_from_the_middle_of_a_longer_training_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    told = "remove the later ones first, such as .*visual/checkpoint-14"
    with pytest.raises(ValueError, match=told):
        train.train([str(copy), "--resume_from_checkpoint", str(checkpoints(copy)[2])])
    with pytest.raises(ValueError, match="'typo' is no checkpoint: it has no trainer_state.json"):
        train.train([str(copy), "--resume_from_checkpoint", "typo"])


def test_checkpoints_of_an_older_version_are_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    checkpoints(copy)[-1].rename(copy / "checkpoints" / "checkpoint-21")
    with pytest.raises(ValueError, match="checkpoint-21' is of an older version.*train afresh"):
        train.train([str(copy), *KEEP_ALL, "--resume_from_checkpoint", "True"])


def test_a_mistake_in_the_arguments_loses_no_finished_result(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    for option, value in (("cluster_share", "5"), ("wise_ft", "2")):
        with pytest.raises(ValueError, match=f"{option} is '?{value}"):
            train.train([str(copy), f"--{option}", value])
    assert (copy / "training.json").exists()
    assert len(checkpoints(copy)) == len(checkpoints(trained))


def test_a_model_that_is_trained_anew_takes_the_old_results_with_it(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    for name in ("calibration.json", "scorecard.json"):
        (copy / name).write_text("{}")
    train.train([str(copy), *KEEP_ALL, "--resume_from_checkpoint", "True", "--wise_ft", "0.5"])
    assert not (copy / "calibration.json").exists()
    assert not (copy / "scorecard.json").exists()


def test_a_finished_training_makes_room_for_a_new_one(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    stale = copy / "checkpoints" / "checkpoint-999999"
    shutil.copytree(checkpoints(trained)[0], stale)
    (copy / "checkpoints" / "notes.txt").write_text("mine")
    other = copy / "checkpoints" / "my" / "other" / "checkpoint-500"
    other.mkdir(parents=True)
    train.train([str(copy), *KEEP_ALL])
    assert not stale.exists()
    assert (copy / "checkpoints" / "notes.txt").exists() and other.exists()
    # same seed, same weights
    assert not moved(weights(checkpoints(copy)[-1]), weights(checkpoints(trained)[-1]))


def test_stage_patterns_that_match_nothing_are_refused(base):
    stage = Stage(name="typo", epochs=1, learning_rate=1e-5, train=["text_modell.*"])
    with pytest.raises(ValueError, match="'text_modell.*' matches no parameter"):
        trainable_names(base, stage)
    deep = stage.model_copy(update={"train": ["logit_scale"], "last_visual_blocks": 99})
    with pytest.raises(ValueError, match="has 4 blocks"):
        trainable_names(base, deep)


def test_a_lower_loss_is_better_and_a_lower_accuracy_is_not(tmp_path):
    for metric, greater in (
        ("accuracy", True),
        ("macro_f1", True),
        ("ece", False),
        ("loss", False),
    ):
        args = StagedTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric)
        assert args.greater_is_better is greater


def test_unknown_patterns_fail_before_anything_is_prepared_or_loaded(tmp_path):
    facades = Domain.load(FACADES)
    typo = facades.stages[1].model_copy(update={"train": ["prototypes", "text_modell.*"]})
    (tmp_path / "domain").mkdir()
    changes = {"name": "typo", "stages": [facades.stages[0], typo, facades.stages[2]]}
    facades.model_copy(update=changes).save(tmp_path / "domain.yaml")
    told = "stage 'visual': pattern 'text_modell.*' matches no parameter"
    with pytest.raises(ValueError, match=told):
        train.train([str(tmp_path / "domain.yaml")])
    assert not Path("runs/typo").exists()
    with pytest.raises(ValueError, match="matches no parameter"):
        check_stages(facades.base, [typo])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 1e-3}, r"stages\[\].learning_rate"),
        ({"num_train_epochs": 2}, r"stages\[\].epochs"),
        ({"warmup_steps": 5}, r"stages\[\].warmup"),
        ({"wise_ft": "1.5"}, "expected a number from 0 to 1, or auto"),
        ({"save_strategy": "no"}, "expected 'epoch', or 'steps'"),
        ({"logging_strategy": "steps"}, "epochs are compared"),
        ({"load_best_model_at_end": True}, "kept anyhow"),
        ({"save_total_limit": 1}, "expected 2 or more"),
        ({"early_stopping_patience": 0}, "expected 1 or more"),
        ({"ignore_data_skip": True}, "trained twice"),
        ({"metric_for_best_model": "f1"}, "expected one of accuracy, macro_f1, ece, loss"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "first epoch"),
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
    options = ["--per_device_train_batch_size", "7", "--wise_ft", "0.5"]
    args = train.parse_arguments(domain, tmp_path, options)
    assert (args.per_device_train_batch_size, args.wise_ft) == (7, "0.5")


@pytest.mark.parametrize(
    ("key", "told"),
    [("loss", r"stages\[\].loss"), ("initial_logit_scale", r"stages\[\].logit_scale")],
)
def test_what_belongs_to_a_stage_now_is_told(domain, tmp_path, key, told):
    old = domain.model_copy(update={"training": {key: "info_nce"}})
    with pytest.raises(ValueError, match=f"'{key}' belongs to a stage now.*{told}"):
        train.parse_arguments(old, tmp_path, [])


def test_without_an_argument_the_facades_are_meant():
    assert train.locate(train.DEFAULT_DOMAIN) == (Domain.load(FACADES), Path("runs/facades"))


def test_a_stage_begins_with_the_best_weights_so_far(prepared, domain, tmp_path):
    """After a stage that did harm, one that hardly moves ends where the good one did."""
    good = domain.stages[0]
    harmful = good.model_copy(update={"name": "harmful", "learning_rate": [0.5]})
    still = good.model_copy(update={"name": "still", "learning_rate": [1e-9]})
    run = fresh(prepared, tmp_path, stages=[good, harmful, still])
    train.train([str(run)])
    accuracies = [row["eval_accuracy"] for row in record_of(run)["epochs"]]
    assert accuracies[1] < accuracies[0]
    best, last = weights(run / "model"), weights(checkpoints(run)[-1])
    assert max((best[name] - last[name]).abs().max() for name in best.keys() & last.keys()) < 1e-5
