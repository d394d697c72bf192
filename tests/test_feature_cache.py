"""The fast step is the plain step: what is frozen is encoded once, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

import train
from nicheclip import cached_map as shards
from nicheclip.clip import encode_texts, load_clip, token_lists
from nicheclip.domain import Domain, Stage
from nicheclip.run import load_prepared
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.contrastive import ContrastiveTrainer
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.feature_cache import encode_views
from nicheclip.training.losses import multi_positive
from nicheclip.training.stages import set_trainable
from nicheclip.training.towers import PIXELS, StageTowers, between, distinct_beginnings
from nicheclip.training.trainer import StagedTrainer
from tests.test_training import TWO_STAGES, checkpoints, fresh, weights

TEXT = ["text_model.*", "text_projection.*", "visual_projection.*", "logit_scale"]


def stage(blocks: int, patterns: list[str] = TEXT) -> Stage:
    rest = {"train": patterns, "last_visual_blocks": blocks, "loss": "multi_positive"}
    return Stage(name="s", epochs=1, learning_rate=1e-3, **rest)


STAGES = {
    "0 blocks": stage(0),
    "1 block": stage(1),
    "2 blocks": stage(2),
    "all blocks": stage(4),
    "the last layer norm": stage(0, ["vision_model.post_layernorm.*", *TEXT]),
    "everything": stage(0, ["*"]),
    "frozen texts": stage(1, ["visual_projection.*", "logit_scale"]),
}


@pytest.fixture
def samples(prepared, domain) -> TrainingSamples:
    _, processor = load_clip(domain.base)
    rows = load_prepared(prepared)["train"]
    return TrainingSamples(rows, domain.prompt_bank[1], domain.augmentation, processor, seed=3)


def staged(
    domain: Domain, samples: TrainingSamples, stage: Stage, folder: Path, **options
) -> ContrastiveTrainer:
    """The trainer of a stage, which is the only one."""
    model, processor = load_clip(domain.base)
    options |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True}
    args = StagedTrainingArguments(**options)
    domain = domain.model_copy(update={"stages": [stage]})
    validation = Views(samples.rows.select(range(5)), processor)
    trainer = StagedTrainer(model, args, domain, processor, samples, validation)
    (variant,) = stage.variants()
    return trainer.trainer_of(variant, trainer.begin_stage(stage), folder / "stage")


def gradients(model: CLIPModel | StageTowers, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all parameters that train, by their names in a CLIPModel."""
    model.zero_grad()
    loss.backward()
    given = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name.removeprefix("clip."): grad.double() for name, grad in given.items()}
    if (used := found.pop("used", None)) is not None:
        table = model.clip.text_model.embeddings.token_embedding.weight
        whole = torch.zeros_like(table, dtype=torch.float64)
        whole[model.tokens] = used
        found["text_model.embeddings.token_embedding.weight"] = whole
    return found


def assert_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Every gradient, relative to the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / largest
        assert error < tolerance, f"{name}: {error:.1e}"


def plain_step(
    domain: Domain, batch: dict, chosen: Stage, dtype: torch.dtype
) -> tuple[torch.Tensor, dict]:
    """CLIPModel's own forward pass: images from pixels, each with its prompt of 77 tokens."""
    model, processor = load_clip(domain.base)
    model.to(dtype)
    set_trainable(model, chosen)
    prompts = [domain.prompt_bank[0][prompt] for prompt in batch["prompts"]]
    length = model.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
    tokens = processor.tokenizer(prompts, **options)
    outputs = model(pixel_values=batch["images"].to(dtype), **tokens)
    logits = model.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.T
    loss = multi_positive(logits, batch["labels"], 0.1)
    return loss, gradients(model, loss)


@pytest.mark.parametrize("name", STAGES)
def test_the_fast_step_is_the_plain_step(name, domain, samples, tmp_path):
    """From the same pixels: distinct prompts at their length, the class token in the last block."""
    trainer = staged(domain, samples, STAGES[name], tmp_path, cached_views=0)
    batch = trainer.data_collator([samples[index] for index in range(0, 48, 4)])
    expected, expected_gradients = plain_step(domain, batch, STAGES[name], torch.float32)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert_equal(gradients(trainer.model, loss), expected_gradients, 1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_in_double_precision_the_towers_agree_to_ten_digits(name, domain, samples):
    """Cut where the stage allows it, the states before it as they are."""
    batch = torch.utils.data.default_collate([samples[index] for index in range(0, 48, 4)])
    expected, expected_gradients = plain_step(domain, batch, STAGES[name], torch.float64)
    clip, processor = load_clip(domain.base)
    set_trainable(clip.double(), STAGES[name])
    model = StageTowers(clip, token_lists(processor, domain.prompt_bank[0]))
    images = batch["images"].double()
    if model.cut != PIXELS:
        with torch.no_grad():
            images = between(clip.vision_model, images, PIXELS, model.cut)
    distinct, of_image = batch["prompts"].unique(return_inverse=True)
    image_embeds, text_embeds, scale = model(images, distinct)
    loss = multi_positive(scale * image_embeds @ text_embeds[of_image].T, batch["labels"], 0.1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert_equal(gradients(model, loss), expected_gradients, 1e-10)


def test_prompts_share_their_beginnings_however_many_they_are(domain, monkeypatch):
    clip, processor = load_clip(domain.base)
    prompts = domain.prompt_bank[0]
    bank = token_lists(processor, prompts)
    model = StageTowers(clip, bank)
    beginnings = {tuple(own[:end]) for own in bank for end in range(1, len(own) + 1)}
    assert len(distinct_beginnings(bank)[0]) == len(beginnings)
    monkeypatch.setattr("nicheclip.training.towers.PROMPTS_AT_ONCE", 5)
    with torch.no_grad():
        _, found, _ = model(torch.zeros(1, 3, 96, 96), torch.arange(len(bank)))
    torch.testing.assert_close(found, encode_texts(clip, processor, prompts), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
@pytest.mark.parametrize(
    "name", ["0 blocks", "1 block", "2 blocks", "all blocks", "the last layer norm"]
)
def test_kept_views_train_as_their_pixels_do(
    name, dtype, tolerance, domain, samples, tmp_path, monkeypatch
):
    monkeypatch.setattr("nicheclip.training.feature_cache.KEPT_AS", np.dtype(dtype).type)
    trainer = staged(domain, samples, STAGES[name], tmp_path, cached_views=2)
    chosen = list(range(0, 48, 4))
    kept = trainer.data_collator([samples[index] for index in chosen])
    samples.features = samples.view
    pixels = trainer.data_collator([samples[index] for index in chosen])
    assert kept["images"].ndim in (2, 3)
    assert pixels["images"].ndim == 4
    losses = [trainer.compute_loss(trainer.model, batch) for batch in (kept, pixels)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=tolerance)
    assert_equal(*(gradients(trainer.model, loss) for loss in losses), tolerance)


def test_what_all_stages_leave_frozen_is_encoded_once(domain, samples, tmp_path, monkeypatch):
    """The pooled states are worked out from those after the blocks that no stage trains."""
    monkeypatch.setattr("nicheclip.training.feature_cache.KEPT_AS", np.float32)
    model, _ = load_clip(domain.base)
    tower = model.vision_model
    both = encode_views(tower, samples, 2, [2, 4], tmp_path / "both")
    alone = encode_views(tower, samples, 2, [4], tmp_path / "alone")
    folders = sorted(path.name for path in (tmp_path / "both").iterdir())
    assert folders == ["after-block-2", "after-block-4"]
    places = [(row, view) for view in range(2) for row in range(len(samples.rows))]
    np.testing.assert_allclose([both(*p) for p in places], [alone(*p) for p in places], atol=2e-5)
    assert both(0, 0).shape == (model.config.vision_config.hidden_size,)
    with torch.no_grad():
        pooled = tower(samples.view(0, 1)[None]).pooler_output[0]
        torch.testing.assert_close(tower.post_layernorm(both(0, 1)), pooled, atol=2e-5, rtol=0)
    assert ForkingPickler.dumps(both), "it travels to the workers of a DataLoader"
    assert not np.allclose(both(0, 0), both(0, 1)), "each view is another one"


def test_visits_take_the_views_in_turn(domain, samples):
    samples.views, samples.patch_dropout = 3, 0.5
    seen: dict[int, list[int]] = {}

    def features(row: int, view: int) -> torch.Tensor:
        seen.setdefault(row, []).append(view)
        return torch.zeros(3, 2)

    samples.features = features
    for epoch in range(3):
        samples.set_epoch(epoch)
        for sample in range(len(samples)):
            samples[sample]
    for row, views in seen.items():
        assert len(views) == 3 * samples.repeats[row]
        assert np.ptp(np.bincount(views, minlength=3)) == 0, "each view comes equally often"


def encoded(tower, samples, cache: Path, **options) -> set[str]:
    """Names of the shards, each of which says what it was made of."""
    encode_views(tower, samples, 1, [options.pop("cut", 2)], cache, **options)
    return {f"{path.parent.name}/{path.name}" for path in cache.glob("*/*") if path.is_dir()}


def test_a_shard_is_known_by_everything_it_depends_on(domain, prepared, samples, tmp_path):
    model, processor = load_clip(domain.base)
    tower = model.vision_model
    cache = tmp_path / "cache"
    first = encoded(tower, samples, cache)
    assert encoded(tower, samples, cache) == first
    prompts, plain = domain.prompt_bank[1], domain.augmentation
    harder = plain.model_copy(update={"hue": 0.3})
    for rows, augmentation, seed in (
        (samples.rows, plain, 4),
        (samples.rows, harder, 3),
        (samples.rows.select(range(9)), plain, 3),
    ):
        changed = TrainingSamples(rows, prompts, augmentation, processor, seed)
        now = encoded(tower, changed, cache)
        assert not now & first, "a stale shard must not be read, nor lie about"
    assert encoded(tower, samples, cache) == first
    for options in ({"autocast": torch.bfloat16}, {"cut": 1}):
        assert not encoded(tower, samples, tmp_path / str(options), **options) & first
    with torch.no_grad():
        model.vision_model.encoder.layers[3].mlp.fc1.bias += 1
        assert encoded(tower, samples, cache) == first, "a block after the cut does not matter"
        model.vision_model.encoder.layers[1].mlp.fc1.bias += 1
        assert not encoded(tower, samples, cache) & first


def test_an_interrupted_encoding_goes_on(domain, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 16)
    model, _ = load_clip(domain.base)
    tower = model.vision_model
    whole = encode_views(tower, samples, 1, [2], tmp_path / "whole")

    class Interrupted(TrainingSamples):
        drawn, last = 0, 40

        def view(self, row: int, view: int) -> torch.Tensor:
            if self.drawn == self.last:
                raise KeyboardInterrupt
            self.drawn += 1
            return super().view(row, view)

    others = domain.prompt_bank[1], domain.augmentation, load_clip(domain.base)[1]
    stopped = Interrupted(samples.rows, *others, seed=3)
    with pytest.raises(KeyboardInterrupt):
        encode_views(tower, stopped, 1, [2], tmp_path / "cut")
    stopped.drawn, stopped.last = 0, 10_000
    resumed = encode_views(tower, stopped, 1, [2], tmp_path / "cut")
    assert stopped.drawn == len(samples.rows) - 32, "two shards were whole"
    for row in range(len(samples.rows)):
        np.testing.assert_array_equal(resumed(row, 0), whole(row, 0))


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    domain, samples, tmp_path, monkeypatch
):
    model, _ = load_clip(domain.base)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    told = r"--cached_views 2.* needs 0\.0 GB in .* where 0\.0 GB are free"
    with pytest.raises(OSError, match=told):
        encode_views(model.vision_model, samples, 2, [2], tmp_path / "full")
    assert not list((tmp_path / "full").glob("*/*"))


def test_states_that_the_kept_precision_can_not_hold_are_an_error(domain, samples, tmp_path):
    model, _ = load_clip(domain.base)
    with torch.no_grad():
        model.vision_model.pre_layrnorm.bias += 1e6
    with pytest.raises(FloatingPointError, match="--cached_views 0"):
        encode_views(model.vision_model, samples, 1, [0], tmp_path)


def test_stages_in_any_order_resume_to_the_same_weights(prepared, tmp_path):
    """Visual first: the text stage's features depend on what the visual stage has learned."""
    run = fresh(prepared, tmp_path / "whole", stages=TWO_STAGES[::-1])
    keep = "--save_strategy steps --save_steps 4 --save_total_limit 99 --cached_views 2".split()
    train.train([str(run), *keep])
    for kept in (5, 6):  # at the boundary, and in the text stage
        resumed = tmp_path / f"from-{kept}" / "run"
        shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("cache"))
        for path in checkpoints(resumed)[kept:]:
            shutil.rmtree(path)
        (resumed / "training.json").unlink()
        train.train([str(resumed), *keep, "--resume_from_checkpoint", "True"])
        expected, found = weights(run / "model"), weights(resumed / "model")
        assert all(torch.equal(expected[name], found[name]) for name in expected), kept


def test_the_record_says_what_was_saved(prepared, tmp_path):
    run = fresh(prepared, tmp_path)
    train.train([str(run), "--cached_views", "2"])
    record = json.loads((run / "training.json").read_text())["features"]
    assert record["views"] == 2
    assert record["encoded"] == 2 * len(load_prepared(run)["train"])
    assert 0 < record["bytes"] < 1e8
