"""What the cluster batch sampler promises."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nicheclip.sampler import ClusterBatchSampler

CLASS_CLUSTERS = [0, 0, 1, 1, 2, 3]


def labels_of(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


SHAPES = {
    "even": labels_of(50, 50, 50, 50, 50, 50),
    "uneven": labels_of(120, 7, 33, 61, 90, 19),
    "tiny cluster": labels_of(100, 100, 100, 100, 100, 3),
}


@pytest.mark.parametrize("labels", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("batch_size", [7, 16, 32])
def test_batches_are_full_of_one_cluster_and_leave_nobody_out(labels, share, batch_size):
    sampler = ClusterBatchSampler(labels, CLASS_CLUSTERS, batch_size, share)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert {len(batch) for batch in batches} == {batch_size}
    assert set(np.concatenate(batches)) == set(range(len(labels)))
    for batch in batches:
        clusters = Counter(CLASS_CLUSTERS[labels[index]] for index in batch)
        assert max(clusters.values()) >= share * batch_size


def test_each_sample_once_while_clusters_are_large():
    labels = SHAPES["even"]  # 300 samples
    sampler = ClusterBatchSampler(labels, CLASS_CLUSTERS, batch_size=20, cluster_share=0.5)
    visits = np.bincount(np.concatenate(list(sampler)), minlength=len(labels))
    assert len(sampler) == 15
    assert (visits == 1).all()


def test_the_epoch_and_the_seed_decide_the_order():
    def walk(seed: int, epoch: int) -> list[list[int]]:
        sampler = ClusterBatchSampler(SHAPES["uneven"], CLASS_CLUSTERS, 16, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert walk(1, 3) == walk(1, 3)
    assert walk(1, 3) != walk(1, 4)
    assert walk(1, 3) != walk(2, 3)


def test_every_cluster_leads_batches():
    labels = SHAPES["uneven"]
    leads = Counter()
    for batch in ClusterBatchSampler(labels, CLASS_CLUSTERS, 16):
        leads[Counter(CLASS_CLUSTERS[labels[index]] for index in batch[:8]).most_common(1)[0][0]] += 1
    assert set(leads) == {0, 1, 2, 3}


@pytest.mark.parametrize(("batch_size", "share", "word"), [(16, 1.5, "cluster_share"), (301, 0.5, "batch_size")])
def test_impossible_settings_are_refused(batch_size, share, word):
    with pytest.raises(ValueError, match=word):
        ClusterBatchSampler(SHAPES["even"], CLASS_CLUSTERS, batch_size, share)
