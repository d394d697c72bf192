"""What must hold for any domain file, batch, division into splits and calibration.

The examples are hypothesis'.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from data_prep.divide import HELD_OUT, assign_splits
from nicheclip.domain import Domain, DomainError, Splits, class_key
from nicheclip.evaluation.calibration import (
    FEW_ERRORS,
    calibrate_temperature,
    fit_abstention,
    fit_conformal,
    fit_temperature,
    nll,
)
from nicheclip.head import prediction_sets
from nicheclip.training.sampler import ClusterBatchSampler
from tests.test_domain import minimal

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
settings.register_profile(
    "modest",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("modest")

WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
).filter(str.strip)
SHARES = st.floats(0, 1, allow_nan=False)


@st.composite
def domains(draw: st.DrawFn) -> dict:
    """The content of a valid domain file."""
    names = draw(st.lists(WORDS, min_size=2, max_size=8, unique_by=class_key))
    classes = {
        name: [f"{number} {prompt}" for prompt in draw(st.lists(WORDS, min_size=1, max_size=3))]
        for number, name in enumerate(names)
    }
    homes = draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    clusters = defaultdict(list)
    for name, home in zip(names, homes, strict=True):
        clusters[f"c{home}"].append(name)
    stage = st.fixed_dictionaries(
        {
            "name": WORDS,
            "epochs": st.integers(1, 50),
            "learning_rate": st.floats(1e-8, 1),
            "train": st.lists(WORDS, max_size=3),
        },
        optional={"warmup": st.floats(0, 0.99), "last_visual_blocks": st.integers(0, 12)},
    )
    gated = st.sampled_from(["accuracy", "macro_f1", "ece", "nll"])
    shares = {name: st.floats(0.01, 0.3) for name in HELD_OUT}
    values = st.one_of(st.integers(), SHARES, WORDS)
    optional = {
        "clusters": st.just(dict(clusters)),
        "splits": st.fixed_dictionaries({}, optional=shares),
        "samples_per_class": st.integers(1, 500),
        "selective_accuracy": st.floats(0.01, 0.99),
        "quality_filter": st.sampled_from([{"mode": "linear_probe"}, {"mode": "none"}]),
        "training": st.dictionaries(WORDS, values, max_size=3),
    }
    return {
        "name": draw(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,10}", fullmatch=True)),
        "title": draw(WORDS),
        "description": draw(WORDS),
        "base": draw(st.sampled_from(["openai/clip-vit-base-patch32", "a-model"])),
        "classes": classes,
        "stages": draw(st.lists(stage, min_size=1, max_size=3)),
        "gates": draw(st.dictionaries(gated, SHARES)),
        **draw(st.fixed_dictionaries({}, optional=optional)),
    }


@given(raw=domains())
def test_any_valid_domain_survives_being_written(raw, tmp_path):
    path = tmp_path / "domain.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    domain = Domain.load(path)
    assert domain.class_names == list(raw["classes"])
    members = [name for names in domain.clusters.values() for name in names]
    assert sorted(members) == sorted(raw["classes"])
    domain.save(tmp_path / "copy.yaml")
    assert Domain.load(tmp_path / "copy.yaml") == domain


def loads_or_tells(path: Path) -> None:
    try:
        Domain.load(path)
    except DomainError as error:
        assert str(path.name) in str(error)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates()
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(Domain.model_fields))


@settings(max_examples=250)
@given(changes=st.dictionaries(KEYS, ANYTHING, min_size=1, max_size=3))
def test_wrong_values_give_a_domain_error_and_no_other(changes, tmp_path):
    path = tmp_path / "domain.yaml"
    path.write_text(yaml.safe_dump(minimal() | changes), encoding="utf-8")
    loads_or_tells(path)


@settings(max_examples=250)
@given(
    damage=st.lists(
        st.tuples(st.integers(0, 600), st.binary(max_size=3), st.integers(0, 5)),
        min_size=1,
        max_size=4,
    )
)
def test_a_damaged_file_gives_a_domain_error_and_no_other(damage, tmp_path):
    content = yaml.safe_dump(minimal()).encode()
    for place, inserted, removed in damage:
        content = content[:place] + inserted + content[place + removed :]
    path = tmp_path / "domain.yaml"
    path.write_bytes(content)
    loads_or_tells(path)


@settings(max_examples=250)
@given(text=st.text("?:[]{}&*!<>=-|%'\"#, \n09ab.e", max_size=40), place=st.integers(0, 400))
@example(text="a: 2026-13-45\n", place=0)
@example(text="? [a]\n: b\n", place=0)
@example(text="a: !!timestamp x\n", place=0)
@example(text="a: " + 3000 * "[", place=0)
@example(text="a: " + 5000 * "9" + "\n", place=0)
def test_what_yaml_can_write_and_python_not_gives_a_domain_error_and_no_other(
    text, place, tmp_path
):
    content = yaml.safe_dump(minimal())
    path = tmp_path / "domain.yaml"
    path.write_text(content[:place] + text + content[place:], encoding="utf-8")
    loads_or_tells(path)


@st.composite
def samplings(draw: st.DrawFn) -> dict:
    classes = draw(st.integers(1, 7))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=8, max_size=120))
    return {
        "labels": np.array(labels),
        "class_clusters": draw(st.lists(st.integers(0, 3), min_size=classes, max_size=classes)),
        "batch_size": draw(st.integers(1, 2)) * 4,
        "cluster_share": draw(SHARES),
        "seed": draw(st.integers(0, 9)),
    }


@given(arguments=samplings(), epoch=st.integers(0, 5), num_processes=st.sampled_from([1, 2, 4]))
def test_batches_are_full_led_by_one_cluster_leave_nobody_out_and_are_shared(
    arguments, epoch, num_processes
):
    ranks = [
        ClusterBatchSampler(**arguments, num_processes=num_processes, process_index=rank)
        for rank in range(num_processes)
    ]
    for rank in ranks:
        rank.set_epoch(epoch)
    whole, size = list(ranks[0].global_batches()), arguments["batch_size"]
    walked = [list(rank) for rank in ranks]
    assert {len(own) for own in walked} == {len(ranks[0])} == {len(whole)}
    for batch, parts in zip(whole, zip(*walked, strict=True), strict=True):
        assert len(batch) == size
        assert sum(parts, []) == batch, "each place of a batch goes to one process"
        led = batch[: int(np.ceil(arguments["cluster_share"] * size))]
        assert len({arguments["class_clusters"][arguments["labels"][index]] for index in led}) <= 1
    assert set(np.concatenate(whole)) == set(range(len(arguments["labels"])))
    assert len({str(rank.composition()) for rank in ranks}) == 1


@st.composite
def collections(draw: st.DrawFn) -> tuple[list[int], list[str]]:
    """Labels and group names of images, in any order; some groups hold images of two classes."""
    sizes = draw(
        st.lists(st.lists(st.integers(1, 4), min_size=4, max_size=25), min_size=1, max_size=5)
    )
    labels, groups = [], []
    for label, own in enumerate(sizes):
        for number, size in enumerate(own):
            labels += [label] * size
            groups += [f"{label} {number}"] * size
    for group in draw(st.lists(st.sampled_from(sorted(set(groups))), max_size=4, unique=True)):
        labels.append(draw(st.integers(0, len(sizes) - 1)))
        groups.append(group)
    order = draw(st.permutations(range(len(labels))))
    return [labels[index] for index in order], [groups[index] for index in order]


@given(images=collections(), shares=st.tuples(*[st.floats(0.02, 0.32)] * 3))
def test_a_group_is_in_one_split_and_every_class_in_every_one(images, shares):
    labels, groups = images
    splits = Splits(**dict(zip(HELD_OUT, shares, strict=True)))
    assigned = assign_splits(np.array(labels), groups, splits)
    homes = defaultdict(set)
    for group, split in zip(groups, assigned, strict=True):
        homes[group].add(split)
    assert all(len(splits) == 1 for splits in homes.values())
    # a group counts towards the class of its first image
    class_of = dict(zip(reversed(groups), reversed(labels), strict=True))
    for label in set(labels):
        own = {homes[group].copy().pop() for group, other in class_of.items() if other == label}
        enough = list(class_of.values()).count(label) >= 4
        assert own == {"train", *HELD_OUT} or not enough, "of four groups, one goes to each split"


@given(st.tuples(*[st.integers(1, 12)] * 3), st.integers(50, 90), st.integers(0, 20))
def test_counts_are_met_and_shares_move_few_earlier_images(counts, per_class, added):
    groups = [f"image {number}" for number in range(2 * (per_class + added))]
    labels = np.arange(len(groups)) % 2
    splits = Splits(**dict(zip(HELD_OUT, counts, strict=True)))
    by_count = np.array(assign_splits(labels, groups, splits))
    for label in (0, 1):
        for name, count in zip(HELD_OUT, counts, strict=True):
            assert (by_count[labels == label] == name).sum() == count
    earlier = slice(2 * per_class)
    by_share = assign_splits(labels, groups, Splits())
    alone = assign_splits(labels[earlier], groups[earlier], Splits())
    moved = sum(before != after for before, after in zip(alone, by_share[earlier], strict=True))
    assert moved <= 6 * (added + 1) * (added > 0), "over three bounds of two classes"


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) whose softmax tells the truth about labels (N,) that are drawn from it."""
    size = draw(st.integers(30, 300)), draw(st.integers(2, 8))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = rng.normal(0, draw(st.floats(0.5, 4)), size)
    falling = softmax(logits, axis=1).cumsum(axis=1)
    return logits, (rng.random((len(logits), 1)) > falling).sum(axis=1).clip(max=size[1] - 1)


@given(answer=answers(), factor=st.floats(0.3, 4))
def test_the_temperature_follows_the_logits_and_is_the_best(answer, factor):
    logits, labels = answer
    right = logits.argmax(axis=1) == labels
    assume(right.any() and not right.all())
    value = fit_temperature(logits, labels)
    assume(0.1 < value < 10)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * value, rel=1e-3)
    assert all(
        nll(logits / value, labels) <= nll(logits / other, labels) + 1e-9
        for other in (1, value / 2, 2 * value)
    )
    groups = np.arange(len(labels))
    fitted = calibrate_temperature(logits, labels, groups, resamples=5)
    assert np.isfinite([fitted["value"], fitted["low"], fitted["high"]]).all()
    assert (fitted["warning"] != "") == ((~right).sum() < FEW_ERRORS)


@given(answer=answers(), coverages=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)))
def test_prediction_sets_are_never_empty_grow_with_their_coverage_and_hold_the_label(
    answer, coverages
):
    logits, labels = answer
    probabilities = softmax(logits, axis=1)
    small, large = (
        prediction_sets(probabilities, fit_conformal(probabilities, labels, coverage))
        for coverage in sorted(coverages)
    )
    assert small.any(axis=1).all()
    assert (small <= large).all()
    assert large[np.arange(len(labels)), labels].mean() >= max(coverages)
    assert small[np.arange(len(labels)), probabilities.argmax(axis=1)].all()


@given(answer=answers(), aims=st.tuples(SHARES, SHARES))
def test_a_higher_aim_answers_no_more_and_a_higher_coverage_no_less(answer, aims):
    logits, labels = answer
    probabilities, (low, high) = softmax(logits, axis=1), sorted(aims)
    modest, strict = (fit_abstention(probabilities, labels, aim) for aim in (low, high))
    if strict["target_reached"]:
        assert modest["target_reached"] and modest["threshold"] <= strict["threshold"]
        assert strict["selective_accuracy"] >= high
    few, many = (fit_abstention(probabilities, labels, 0.9, coverage=aim) for aim in (low, high))
    assert few["threshold"] >= many["threshold"] and few["coverage"] <= many["coverage"]
    assert many["coverage"] >= high
    for fitted in (modest, strict, few, many):
        answered = probabilities.max(axis=1) >= fitted["threshold"]
        assert answered.mean() == pytest.approx(fitted["coverage"]) and answered.any()
