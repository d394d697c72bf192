"""The default recipe: free prototypes, averages, mixtures, grids, distillation."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.datasets import make_blobs
from torch.nn.functional import normalize
from transformers import CLIPModel, TrainerState

import train
from nicheclip.clip import encode_images, encode_texts, load_clip
from nicheclip.domain import Domain, DomainError
from nicheclip.evaluation.calibration import best_nll
from nicheclip.evaluation.metrics import correct
from nicheclip.evaluation.probe import fit_strong_probe, load_strong_probe, save_strong_probe
from nicheclip.recipe import RECIPES, Stage, check_order
from nicheclip.run import begin_training, load_prepared
from nicheclip.training.callbacks import TrainingInterrupted, WeightAverage
from nicheclip.training.checkpoints import kept_weights, read_state
from nicheclip.training.contrastive import ContrastiveTrainer
from nicheclip.training.data import TrainingSamples
from nicheclip.training.distillation import PromptTargets, generic_texts
from nicheclip.training.lda import discriminants
from nicheclip.training.losses import supervised_contrastive
from nicheclip.training.towers import StageTowers
from tests.conftest import FACADES


def stage(**fields) -> Stage:
    return Stage.model_validate({"name": "any", "epochs": 1, "learning_rate": 1e-3} | fields)


HEAD = {"train": ["prototypes", "visual_projection.*"]}
TEXT = {"train": ["text_model.*"], "loss": "distillation"}


def trained_record(run: Path) -> dict:
    return json.loads((run / "training.json").read_text())


def trained_copy(run: Path, folder: Path) -> Path:
    """A run as `train.py` leaves it, to be trained again."""
    left_out = shutil.ignore_patterns("hub", "figures", "model")
    return shutil.copytree(run, folder / "run", ignore=left_out)


def model_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(part, other[name]) for name, part in one.items())


def test_every_named_recipe_can_be_trained():
    for name in RECIPES:
        raw = Domain.load(FACADES).model_dump(exclude={"stages"}) | {"recipe": name}
        domain = Domain.model_validate(raw)
        assert [each.name for each in domain.stages] == [
            each["name"] for each in RECIPES[name]["stages"]
        ]
    assert Domain.load(FACADES).recipe == "default"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("recipe", "lucky", "'lucky' is no recipe; expected one of default"),
        ("recipe", ["a"], "recipe: Input should be a valid string"),
        ("training", ["a"], "training: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_recipe_is_told(tmp_path, key, value, told):
    raw = yaml.safe_load((FACADES / "domain.yaml").read_text()) | {key: value}
    (tmp_path / "domain.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(DomainError, match=told):
        Domain.load(tmp_path)


def test_patches_of_pixels_are_left_out_in_training_alone():
    clip, _ = load_clip(FACADES / "base")
    towers = StageTowers(clip, [[0, 1]], None, patch_dropout=0.5).eval()
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = towers.encode_images(pixels)
        torch.testing.assert_close(clip.get_image_features(pixels).pooler_output, whole)
        torch.manual_seed(0)
        first = towers.train().encode_images(pixels)
        second = towers.encode_images(pixels)
    assert not torch.allclose(first, whole) and not torch.allclose(first, second)


def test_a_new_training_leaves_nothing_of_an_old_one(run, tmp_path):
    """The variants of another seed must not pass for finished ones when it is resumed."""
    copy = trained_copy(run, tmp_path)
    old = all_checkpoints(copy)
    (copy / "training.json").unlink()
    with pytest.raises(ValueError, match="holds an unfinished training"):
        train.train([str(copy), "--seed", "1"])
    (copy / "training.json").write_text("{}")
    begin_training(copy, copy / "checkpoints", {}, resume=False)
    assert old and not all_checkpoints(copy)


def test_one_image_a_class_trains(run, tmp_path):
    """Nothing is known of what varies within a class, and a batch holds them all."""
    copy = trained_copy(run, tmp_path)
    shutil.rmtree(copy / "checkpoints")
    splits = load_prepared(copy)
    labels = splits["train"]["label"][:]
    firsts = [labels.index(label) for label in sorted(set(labels))]
    splits["train"].select(firsts).save_to_disk(tmp_path / "few")
    shutil.rmtree(copy / "data" / "train")
    (tmp_path / "few").rename(copy / "data" / "train")
    train.train([str(copy), "--cached_views", "0"])
    assert len(trained_record(copy)["stages"]) == 3


def test_the_stages_of_a_domain_take_the_place_of_a_recipe():
    raw = Domain.load(FACADES).model_dump() | {"recipe": None}
    own = [stage(train=["logit_scale"]).model_dump()]
    assert Domain.model_validate(raw | {"stages": own}).stages == [stage(train=["logit_scale"])]


def test_a_grid_gives_one_variant_a_combination_and_balanced_ones_take_as_many_steps():
    grid = stage(**HEAD, learning_rate=[1e-3, 1e-4], epochs=[20, 60])
    found = grid.model_copy(update={"sampling": ["natural", "balanced"]}).variants(repeats=4)
    told = {(each.learning_rate[0], each.sampling[0], each.epochs[0]) for each in found}
    natural = {(rate, "natural", epochs) for rate in (1e-3, 1e-4) for epochs in (20, 60)}
    assert told == natural | {(rate, "balanced", n) for rate in (1e-3, 1e-4) for n in (5, 15)}
    assert stage(**HEAD, epochs=20, sampling="balanced").variants(4)[0].epochs == [20]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([stage(**TEXT)], "no stage before it trains them"),
        ([stage(**HEAD)], "never reach the text tower"),
        ([stage(**HEAD), stage(name="2", train=["text_model.*"])], "stand in for the text tower"),
        ([stage(**HEAD), stage(**HEAD)], "has the name of another one"),
        ([stage(**HEAD), stage(**TEXT | {"name": "2", "train": ["*"]})], "leave the rest out"),
        ([stage(train=["prototypes", "*"])], "in place of the text side"),
        ([stage(train=["prototypes"], start="lda")], "is for a first stage"),
        ([stage(**HEAD, loss="info_nce"), stage(**TEXT)], "expected class_prompts"),
        ([stage(train=["logit_scale"], start="lda")], "is for a first stage"),
        ([stage(**HEAD), stage(name="2", **HEAD, start="lda")], "is for a first stage"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused(stages, told):
    with pytest.raises(ValueError, match=told):
        check_order(stages)


def test_supcon_by_hand():
    """Two images of one class at a right angle, a third of another class opposite the first."""
    embeds = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    loss = supervised_contrastive(embeds, torch.tensor([0, 0, 1]), temperature=0.5)
    first = np.log(1 + np.exp(-2.0))  # logits 0 (positive) and -2
    second = np.log(2)  # 0 (positive) and 0
    assert loss.item() == pytest.approx((first + second) / 2)
    alone = embeds.clone().requires_grad_()
    none = supervised_contrastive(alone, torch.tensor([0, 1, 2]))
    none.backward()
    assert none.item() == 0 and not alone.grad.any(), "no image has a positive"


def test_the_average_follows_the_weights_and_is_what_is_kept(tmp_path):
    clip = CLIPModel.from_pretrained(FACADES / "base")
    clip.requires_grad_(False)
    clip.visual_projection.weight.requires_grad_(True)
    towers = StageTowers(clip, [[0, 1]], torch.ones(3, clip.config.projection_dim))
    average = WeightAverage(towers, decay=0.75)
    start = towers.prototypes.detach().clone()
    with torch.no_grad():
        towers.prototypes += 1
    late = TrainerState(global_step=1000)
    average.on_optimizer_step(None, late, None)
    with torch.no_grad():
        towers.prototypes += 1
    average.on_optimizer_step(None, late, None)
    expected = 0.75 * (0.75 * start + 0.25 * (start + 1)) + 0.25 * (start + 2)
    with average.shown():
        torch.testing.assert_close(towers.prototypes.detach(), expected)
    torch.testing.assert_close(towers.prototypes.detach(), start + 2)
    average.save(tmp_path / "trained.safetensors")
    assert set(kept_weights(tmp_path)) == {"clip.visual_projection.weight", "prototypes"}
    torch.testing.assert_close(kept_weights(tmp_path)["prototypes"], expected)
    with torch.no_grad():
        towers.prototypes.zero_()
    early = WeightAverage(towers, decay=0.75)
    with torch.no_grad():
        towers.prototypes += 1
    early.on_optimizer_step(None, TrainerState(global_step=0), None)
    torch.testing.assert_close(early.weights["prototypes"], torch.full_like(start, 0.9))
    again = WeightAverage(towers, decay=0.75)
    again.load(tmp_path)
    torch.testing.assert_close(towers.prototypes.detach(), start + 2)
    torch.testing.assert_close(again.weights["prototypes"], expected)


def stretched(seed: int, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes that differ along one of 12 directions, where another one is ten times as wide."""
    features, labels = make_blobs([200] * len(centres), centers=centres, random_state=seed)
    features[:, -1] *= 30
    return features.astype(np.float32) + 5, labels


CENTRES = np.zeros((3, 12))
CENTRES[:, :2] = [(6, 0), (-3, 5), (-3, -5)]


def test_discriminants_see_through_what_is_wide_and_says_nothing():
    train_set, validation = stretched(0, CENTRES), stretched(1, CENTRES)
    projection = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 8)))[0].T
    embeds = train_set[0] @ projection.T
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    found = discriminants(train_set, validation, embeds, num_classes=4)
    features, labels = stretched(2, CENTRES)
    seen = (features - found["mean"]) @ found["projection"].T
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    assert correct(seen @ found["prototypes"].T, labels).mean() > 0.95
    means = np.stack([embeds[train_set[1] == c].mean(axis=0) for c in range(3)])
    plain = features @ projection.T
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    assert correct(plain @ means.T, labels).mean() < 0.85, "the base's embeddings do not"
    assert found["projection"].shape == (8, 12)
    np.testing.assert_allclose(np.linalg.norm(found["prototypes"][:3], axis=1), 1, rtol=1e-6)
    assert not found["prototypes"][3].any(), "a class without an image"


def test_the_strong_probe_is_chosen_on_validation_and_kept(tmp_path):
    probe = fit_strong_probe(stretched(0, CENTRES), stretched(1, CENTRES), 3)
    features, labels = stretched(2, CENTRES)
    assert correct(probe.logits(features), labels).mean() > 0.95
    swapped = fit_strong_probe(stretched(0, CENTRES), stretched(1, CENTRES[::-1]), 3)
    assert correct(swapped.logits(features), labels).mean() > 0.6, "fitted on train all the same"
    with pytest.raises(FileNotFoundError, match="accelerate launch train.py"):
        load_strong_probe(tmp_path)
    save_strong_probe(probe, tmp_path)
    np.testing.assert_array_equal(
        load_strong_probe(tmp_path).logits(features), probe.logits(features)
    )


def test_validation_and_not_train_chooses_the_strong_probe():
    rng = np.random.default_rng(0)
    labels = np.arange(460) % 2
    features = rng.normal(size=(460, 40)) + 0.4 * labels[:, None] * (np.arange(40) < 4)
    train, validation = (features[:60], labels[:60]), (features[60:], labels[60:])
    of_validation, of_train = (
        correct(fit_strong_probe(train, judge, 2).logits(features[60:]), labels[60:]).mean()
        for judge in (validation, train)
    )
    assert of_validation > of_train


def test_generic_texts_are_words_of_the_vocabulary_and_none_of_the_prompts():
    processor = load_clip(FACADES / "base")[1]
    prompts = ["a drawing of a gothic building"]
    texts = generic_texts(processor.tokenizer, prompts, seed=1, count=200)
    assert texts == generic_texts(processor.tokenizer, prompts, seed=1, count=200)
    assert len(texts) > 100 and not set(texts) & set(prompts)
    known = {*processor.tokenizer.get_vocab(), *(f"{word}</w>" for word in prompts[0].split())}
    known |= {f"{word}</w>" for word in ("a", "of", "photo")}
    assert {f"{word}</w>" for text in texts for word in text.split()} <= known
    assert any("drawing of" in text for text in texts), "prompts with some words replaced"


def test_a_step_of_distillation_sees_all_canonical_prompts():
    kinds = np.repeat([0, 1, 2], [5, 40, 100])
    targets = PromptTargets(kinds, torch.arange(145.0)[:, None], seed=0)
    first, second = targets[0], targets[1]
    assert first["prompts"][:5].tolist() == [0, 1, 2, 3, 4]
    assert np.bincount(kinds[first["prompts"]]).tolist() == [5, 32, 64]
    assert torch.equal(first["targets"][:, 0], first["prompts"].float())
    assert first["weights"].sum().item() == pytest.approx(1 + 0.3 + 1)
    assert first["prompts"].tolist() != second["prompts"].tolist()
    targets.set_epoch(1)
    assert targets[0]["prompts"].tolist() != first["prompts"].tolist()


def test_samples_leave_patches_out_but_never_the_class_token(prepared, domain):
    rows = load_prepared(prepared)["train"]
    processor = load_clip(domain.base)[1]
    samples = TrainingSamples(rows, domain.prompt_bank[1], domain.augmentation, processor, 0)
    states = torch.arange(17.0)[:, None].expand(17, 4)
    samples.features, samples.views = lambda row, view: states, 1
    assert torch.equal(samples[0]["images"], states)
    samples.patch_dropout = 0.5
    kept = [samples[index]["images"][:, 0].tolist() for index in range(8)]
    assert all(len(each) == 9 and each[0] == 0 and each == sorted(each) for each in kept)
    assert len({tuple(each) for each in kept}) > 1
    samples.features = lambda row, view: states[0]
    assert torch.equal(samples[0]["images"], states[0]), "pooled features are left alone"


def test_natural_sampling_shows_each_image_once(prepared, domain):
    rows = load_prepared(prepared)["train"]
    processor = load_clip(domain.base)[1]
    samples = TrainingSamples(rows, domain.prompt_bank[1], domain.augmentation, processor, 0)
    assert len(samples) == sum(rows["repeats"]) > len(rows)
    samples.sample("natural")
    assert len(samples) == len(rows) and samples.labels.tolist() == rows["label"][:]
    samples.sample("balanced")
    assert np.bincount(samples.row_of_sample).tolist() == rows["repeats"][:]


def test_validation_chooses_the_variant_and_the_mixture(run):
    head, visual, text = trained_record(run)["stages"]
    assert [row["start"] for row in head["tried"]] == ["base", "lda"]
    losses = [row["eval_nll"] for row in head["tried"]]
    assert head["chosen"] == losses.index(min(losses))
    assert [row["mix"] for row in visual["mixes"]] != [] and visual["mixes"] == sorted(
        visual["mixes"], key=lambda row: row["eval_nll"]
    )
    assert "batches" in head and "batches" not in text
    looked_at = {row["stage"]: row for row in trained_record(run)["epochs"] if row["kept"]}
    assert looked_at["head"]["eval_nll"] == min(losses)


def test_the_chosen_nll_is_that_of_validation(run):
    """Worked out anew from the head's checkpoint and the validation split."""
    record = trained_record(run)["stages"][0]
    domain, validation = Domain.load(run), load_prepared(run)["validation"]
    folder = run / "checkpoints" / "1-head" / "variant-1"  # begins with the base as it is
    (checkpoint,) = [path for path in folder.iterdir() if read_state(path).epoch == 4]
    kept = kept_weights(checkpoint)
    model, processor = load_clip(domain.base)
    model.visual_projection.weight.data.copy_(kept["clip.visual_projection.weight"])
    images = (row["image"] for row in validation)
    embeds = encode_images(model, processor, images, len(validation), progress=False)
    logits = 8 * embeds @ normalize(kept["prototypes"], dim=-1).numpy().T
    found = best_nll(logits, np.array(validation["label"]))
    # The cache keeps states in 16 bits.
    assert found == pytest.approx(record["tried"][0]["eval_nll"], abs=0.01)


def test_the_published_text_tower_says_the_prototypes(run):
    """The last stage's targets are the visual stage's average, mixed with the head's end."""
    stages = run / "checkpoints"
    record = trained_record(run)["stages"]
    chosen = stages / "1-head" / f"variant-{record[0]['chosen'] + 1}"
    ends = [
        kept_weights(max(folder.iterdir(), key=lambda path: int(path.name.split("-")[1])))
        for folder in (chosen, stages / "2-visual" / "variant-1", stages / "2-visual" / "variant-2")
    ]
    head, first, second = [end["prototypes"] for end in ends]
    mix = record[1]["mixes"][0]["mix"]
    prototypes = normalize((1 - mix) * head + mix * (first + second) / 2, dim=-1)
    model, processor = load_clip(run / "model")
    said = encode_texts(model, processor, Domain.load(run).canonical_prompts)
    assert (said * prototypes).sum(dim=1).min() > 0.92, "after 60 steps"
    base, _ = load_clip(Domain.load(run).base)
    of_base = encode_texts(base, processor, Domain.load(run).canonical_prompts)
    assert ((said - of_base) * prototypes).sum(dim=1).min() > 0, "each has moved there"
    assert model.logit_scale.exp().item() == pytest.approx(8)


def test_other_texts_stay_where_the_base_has_them(run):
    base, processor = load_clip(Domain.load(run).base)
    tuned, _ = load_clip(run / "model")
    texts = ["a drawing of a red house", "a blue door", "stone"]
    cosines = (encode_texts(base, processor, texts) * encode_texts(tuned, processor, texts)).sum(1)
    assert cosines.min() > 0.9


def all_checkpoints(run: Path) -> list[Path]:
    """In the order in which they were written."""
    found = (run / "checkpoints").rglob("checkpoint-*")
    return sorted(found, key=lambda path: (path.parent.as_posix(), int(path.name.split("-")[1])))


@pytest.mark.parametrize("kept", ["1-head/variant-2", "2-visual/variant-1", "3-text"])
def test_each_stage_resumes_to_the_same_weights(run, tmp_path, kept):
    """From the first checkpoint of a run, as if all that came later had never been."""
    copy = trained_copy(run, tmp_path)
    written = all_checkpoints(copy)
    first = next(path for path in written if path.parent.as_posix().endswith(kept))
    for later in written[written.index(first) + 1 :]:
        shutil.rmtree(later)
    train.train([str(copy), "--resume_from_checkpoint", "True"])
    assert same(model_of(run), model_of(copy))
    assert trained_record(copy)["stages"] == trained_record(run)["stages"]


def test_a_signal_in_the_visual_stage_loses_nothing(run, tmp_path, monkeypatch):
    copy = trained_copy(run, tmp_path)
    shutil.rmtree(copy / "checkpoints")
    (copy / "training.json").unlink()
    steps, plain = iter(range(999)), ContrastiveTrainer.compute_loss

    def pressing(self, *arguments, **options):
        if self.stage.name == "visual" and next(steps) == 1:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "compute_loss", pressing)
        with pytest.raises(TrainingInterrupted, match="2-visual/variant-1/checkpoint-2"):
            train.train([str(copy)])
    train.train([str(copy), "--resume_from_checkpoint", "True"])
    assert same(model_of(run), model_of(copy))


def test_a_mixture_of_nothing_is_what_was_there_before(run, tmp_path):
    copy = trained_copy(run, tmp_path)
    shutil.rmtree(copy / "checkpoints")
    domain = Domain.load(copy)
    head, visual, text = domain.stages
    unmixed = visual.model_copy(update={"mix": [0.0], "runs": 1})
    domain.model_copy(update={"stages": [head, unmixed, text]}).save(copy / "domain.yaml")
    train.train([str(copy)])
    found, base = model_of(copy), load_clip(domain.base)[0].state_dict()
    assert same({n: base[n] for n in base if ".layers." in n and "vision" in n}, found)
    assert not torch.equal(found["visual_projection.weight"], base["visual_projection.weight"])
