"""What the cluster batch sampler promises."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, TensorDataset

from nicheclip.training.sampler import ClusterBatchSampler

CLASS_CLUSTERS = [0, 0, 1, 1, 2, 3]


def labels_of(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


SHAPES = {
    "even": labels_of(50, 50, 50, 50, 50, 50),
    "uneven": labels_of(120, 7, 33, 61, 90, 19),
}


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
        of_batch = Counter(CLASS_CLUSTERS[labels[index]] for index in batch[:8])
        leads[of_batch.most_common(1)[0][0]] += 1
    assert set(leads) == {0, 1, 2, 3}


def test_a_loader_prepared_by_accelerate_walks_and_resumes_the_slice_of_its_process():
    labels = SHAPES["uneven"]
    sampler = ClusterBatchSampler(labels, CLASS_CLUSTERS, 16, num_processes=2, process_index=1)
    loader = DataLoader(TensorDataset(torch.arange(len(labels))), batch_sampler=sampler)
    loader = prepare_data_loader(
        loader, torch.device("cpu"), num_processes=1, process_index=0, put_on_device=True
    )
    loader.set_epoch(3)
    walked = [batch.tolist() for (batch,) in loader]
    assert loader.total_batch_size == 16

    assert sampler.epoch == 3
    assert walked == list(sampler)
    assert [batch.tolist() for (batch,) in skip_first_batches(loader, 4)] == walked[4:]


def test_composition_by_counting_every_pair():
    labels = SHAPES["uneven"]
    sampler = ClusterBatchSampler(labels, CLASS_CLUSTERS, 7)
    sampler.set_epoch(1)
    same_class = hard = pairs = 0
    for batch in sampler:
        for one, other in permutations(range(7), 2):
            one_class, other_class = labels[batch[one]], labels[batch[other]]
            pairs += 1
            same_class += one_class == other_class
            alike = CLASS_CLUSTERS[one_class] == CLASS_CLUSTERS[other_class]
            hard += one_class != other_class and alike
    found = sampler.composition()
    assert found["batches"] == len(sampler)
    assert found["samples"] == 7 * len(sampler)
    assert found["distinct"] == len(labels)
    assert found["same_class_pairs"] == pytest.approx(same_class / pairs)
    assert found["hard_pairs"] == pytest.approx(hard / pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_share": 1.5}, "cluster_share is 1.5"),
        ({"batch_size": 301}, "batch_size is 301"),
        ({"num_processes": 3}, "multiple of the 3 processes .* such as 18"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClusterBatchSampler(SHAPES["even"], CLASS_CLUSTERS, **{"batch_size": 16, **options})
