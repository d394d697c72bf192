"""Batches of which a share comes from one cluster of confusable classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ClusterBatchSampler(Sampler[list[int]]):
    """Batches whose first `cluster_share` comes from one cluster, and whose rest comes from the shuffled pool.

    Every sample is visited at least once an epoch, and exactly once while the clusters are large enough: a cluster
    leads as many batches as its size warrants, what its batches do not take goes to the pool, and all batches are
    full. Samples are only repeated to fill the last batch, or where a cluster is smaller than its share of a batch.

    Args:
        labels: class index of each sample, (N,).
        class_clusters: cluster index of each class, (C,).
        batch_size: samples a batch.
        cluster_share: share of a batch that comes from one cluster, rounded up to whole samples.
        seed: with the epoch, decides the order.

    Raises:
        ValueError: if there are fewer samples than a batch holds, or `cluster_share` is not between 0 and 1.
    """

    def __init__(
        self,
        labels: Sequence[int],
        class_clusters: Sequence[int],
        batch_size: int,
        cluster_share: float = 0.5,
        seed: int = 0,
    ):
        if not 0 <= cluster_share <= 1:
            raise ValueError(f"cluster_share is {cluster_share}; expected a number from 0 to 1")
        if len(labels) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but there are {len(labels)} training samples; lower the batch size"
            )
        self.batch_size = batch_size
        self.drop_last = False  # read by accelerate when it shards batches over processes
        self.seed = seed
        self.epoch = 0
        clusters = np.asarray(class_clusters)[np.asarray(labels)]
        self._members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
        self._from_cluster = math.ceil(cluster_share * batch_size)
        self._leads = self._plan()

    def _plan(self) -> np.ndarray:
        """How many batches each cluster leads: the fewest batches in which every sample has a place."""
        sizes = np.array([len(members) for members in self._members])
        from_pool = self.batch_size - self._from_cluster
        batches = math.ceil(sizes.sum() / self.batch_size)
        while True:
            leads = _apportion(batches, sizes)
            if np.maximum(sizes - leads * self._from_cluster, 0).sum() <= batches * from_pool:
                return leads
            batches += 1

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self._leads.sum())

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        led, leftover = [], []
        for members, leads in zip(self._members, self._leads, strict=True):
            places = leads * self._from_cluster
            walk = _walk(members, places, rng)
            led.extend(np.split(walk[:places], leads) if leads else [])
            leftover.append(walk[places : len(members)])
        from_pool = self.batch_size - self._from_cluster
        pool = rng.permutation(np.concatenate(leftover))
        missing = len(self) * from_pool - len(pool)
        pool = np.concatenate([pool, rng.choice(np.concatenate(self._members), missing, replace=missing > len(pool))])
        for batch, lead in enumerate(rng.permutation(len(led))):
            yield [*led[lead].tolist(), *pool[batch * from_pool : (batch + 1) * from_pool].tolist()]


def _apportion(seats: int, sizes: np.ndarray) -> np.ndarray:
    """Shares out seats in proportion to sizes, by largest remainder."""
    quota = seats * sizes / sizes.sum()
    shares = np.floor(quota).astype(int)
    shares[np.argsort(shares - quota, kind="stable")[: seats - shares.sum()]] += 1
    return shares


def _walk(members: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """The members in random order, walked again in a new order until there are at least `length`."""
    rounds = max(1, math.ceil(length / len(members)))
    return np.concatenate([rng.permutation(members) for _ in range(rounds)])
