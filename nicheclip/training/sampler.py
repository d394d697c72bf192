"""Batches of which a share comes from one cluster of confusable classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

CLUSTER_DRAWS = ("size", "even")


class ClusterBatchSampler(Sampler[list[int]]):
    """Batches whose first `cluster_share` comes from one cluster, and whose rest comes from the shuffled pool.

    Every sample is visited at least once an epoch, and exactly once while the clusters are large
    enough: a cluster leads as many batches as its draw warrants, what its batches do not take goes
    to the pool, and all batches are full. Samples are only repeated to fill the last batches, or
    where a cluster has fewer samples than the batches that it leads take from it.

    Several processes walk the same batches, each its own slice, so that the slices in rank order
    are the batch of one process. The loader must not be sharded again:
    `accelerate.data_loader.prepare_data_loader(…, num_processes=1)`.

    Args:
        labels: class index of each sample, (N,).
        class_clusters: cluster index of each class, (C,).
        batch_size: samples a batch, over all processes.
        cluster_share: share of a batch that comes from one cluster, rounded up to whole samples.
        cluster_draw: "size" if clusters lead batches in proportion to their size, "even" if all
            lead equally many; the epoch then grows, as small clusters are walked several times.
        classes_per_batch: about how many classes the pool's part of a batch comes from. Fewer
            classes mean more positives of each. None: as the shuffled pool has them.
        num_processes: how many processes share a batch.
        process_index: rank of this process, from 0.
        seed: with the epoch, decides the order.

    Raises:
        ValueError: if there are fewer samples than a batch holds, the processes can't share a batch
            equally, or `cluster_share`, `cluster_draw` or `classes_per_batch` is out of range.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        class_clusters: Sequence[int],
        batch_size: int,
        cluster_share: float = 0.5,
        cluster_draw: str = "size",
        classes_per_batch: int | None = None,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
    ):
        if not 0 <= cluster_share <= 1:
            raise ValueError(f"cluster_share is {cluster_share}; expected a number from 0 to 1")
        if cluster_draw not in CLUSTER_DRAWS:
            raise ValueError(
                f"cluster_draw is '{cluster_draw}'; expected one of {', '.join(CLUSTER_DRAWS)}"
            )
        if classes_per_batch is not None and classes_per_batch < 1:
            raise ValueError(
                f"classes_per_batch is {classes_per_batch}; expected 1 or more, or None for the "
                "shuffled pool"
            )
        if batch_size % num_processes:
            raise ValueError(
                f"batch_size is {batch_size} over all processes; expected a multiple of the "
                f"{num_processes} processes that share it, such as "
                f"{math.ceil(batch_size / num_processes) * num_processes}"
            )
        if len(labels) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but there are {len(labels)} training samples; lower "
                "the batch size"
            )
        # accelerate reads both: batch_size, of this process, times num_processes is its
        # total_batch_size
        self.batch_size = batch_size // num_processes
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.epoch = 0
        self._labels = np.asarray(labels)
        self._clusters = np.asarray(class_clusters)[self._labels]  # (N,)
        self._members = [
            np.flatnonzero(self._clusters == cluster) for cluster in np.unique(self._clusters)
        ]
        self._from_cluster = math.ceil(cluster_share * batch_size)
        self._from_pool = batch_size - self._from_cluster
        self._chunk = math.ceil(self._from_pool / classes_per_batch) if classes_per_batch else 1
        self._leads = self._plan(cluster_draw)

    def _plan(self, cluster_draw: str) -> np.ndarray:
        """How many batches each cluster leads: the fewest batches in which every sample has a place."""
        sizes = np.array([len(members) for members in self._members])
        step = len(sizes) if cluster_draw == "even" else 1
        weights = np.ones_like(sizes) if cluster_draw == "even" else sizes
        batches = math.ceil(sizes.sum() / (self._from_cluster + self._from_pool) / step) * step
        while True:
            leads = _apportion(batches, weights)
            if np.maximum(sizes - leads * self._from_cluster, 0).sum() <= batches * self._from_pool:
                return leads
            batches += step

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self._leads.sum())

    def __iter__(self) -> Iterator[list[int]]:
        start = self.process_index * self.batch_size
        for batch in self.global_batches():
            yield batch[start : start + self.batch_size]

    def global_batches(self) -> Iterator[list[int]]:
        """The batches of this epoch over all processes; the same in each."""
        rng = np.random.default_rng([self.seed, self.epoch])
        led, leftover = [], []
        for members, leads in zip(self._members, self._leads, strict=True):
            places = leads * self._from_cluster
            walk = _walk(members, places, rng)
            led.extend(np.split(walk[:places], leads) if leads else [])
            leftover.append(walk[places : len(members)])
        pool = self._in_chunks(rng.permutation(np.concatenate(leftover)), rng)
        missing = len(self) * self._from_pool - len(pool)
        fill = rng.choice(
            np.concatenate(self._members), missing, replace=missing > len(self._labels)
        )
        pool = np.concatenate([pool, self._in_chunks(fill, rng)])
        for batch, lead in enumerate(rng.permutation(len(led))):
            yield [
                *led[lead].tolist(),
                *pool[batch * self._from_pool : (batch + 1) * self._from_pool].tolist(),
            ]

    def _in_chunks(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The shuffled samples, reordered so that up to `_chunk` of one class follow each other."""
        if self._chunk <= 1:
            return samples
        chunks = [samples[:0]]
        for label in np.unique(self._labels[samples]):
            of_class = samples[self._labels[samples] == label]
            chunks.extend(np.split(of_class, range(self._chunk, len(of_class), self._chunk)))
        return np.concatenate([chunks[chunk] for chunk in rng.permutation(len(chunks))])

    def composition(self) -> dict[str, float]:
        """What the batches of this epoch are made of, over all processes.

        Returns:
            "batches" and "samples" of the epoch, the "distinct" samples among the samples, and shares
            of the ordered pairs i != j within a batch: "same_class_pairs", and "hard_pairs" of
            different classes in one cluster.
        """
        batches = np.array(list(self.global_batches()))  # (batches, B)
        same_class = _equal_pairs(self._labels[batches])
        pairs = max(1, batches.size * (batches.shape[1] - 1))  # a batch of one has none
        return {
            "batches": len(batches),
            "samples": batches.size,
            "distinct": len(np.unique(batches)),
            "same_class_pairs": same_class / pairs,
            "hard_pairs": (_equal_pairs(self._clusters[batches]) - same_class) / pairs,
        }


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


def _equal_pairs(batches: np.ndarray) -> int:
    """How many ordered pairs i != j of a row, over all rows of (batches, B), hold the same value."""
    counts = [np.unique(batch, return_counts=True)[1] for batch in batches]
    return int(sum((count * (count - 1)).sum() for count in counts))
