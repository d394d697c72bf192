"""Batches of which a share comes from one cluster of confusable classes."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ClusterBatchSampler(Sampler[list[int]]):
    """Batches of which `cluster_share` comes from one cluster, and the rest from the shuffled pool.

    Every sample comes at least once an epoch: a cluster leads batches in proportion to its size,
    what they do not take goes to the pool, and all batches are full. Samples are only repeated to
    fill the last batches, or where a cluster has fewer than the batches that it leads take.

    Several processes walk the same batches, each its own slice, so that the slices in rank order
    are the batch of one process. The loader must not be sharded again:
    `accelerate.data_loader.prepare_data_loader(…, num_processes=1)`.

    Args:
        labels: class index of each sample, (N,).
        class_clusters: cluster index of each class, (C,).
        batch_size: samples a batch, over all processes.
        cluster_share: share of a batch that comes from one cluster, rounded up to whole samples.
        seed: with the epoch, decides the order.

    Raises:
        ValueError: if there are fewer samples than a batch holds, the processes can't share a batch
            equally, or `cluster_share` is out of range.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        class_clusters: Sequence[int],
        batch_size: int,
        cluster_share: float = 0.5,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
    ):
        if not 0 <= cluster_share <= 1:
            raise ValueError(f"cluster_share is {cluster_share}; expected a number from 0 to 1")
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
        self.epoch = self.epochs_before = 0  # of earlier stages, which `epoch` counts as well
        self._labels = np.asarray(labels)
        self._clusters = np.asarray(class_clusters)[self._labels]  # (N,)
        self._members = [
            np.flatnonzero(self._clusters == cluster) for cluster in np.unique(self._clusters)
        ]
        self._from_cluster = math.ceil(cluster_share * batch_size)
        self._from_pool = batch_size - self._from_cluster
        self._leads = self._plan(math.ceil(len(labels) / batch_size))

    def _plan(self, batches: int) -> np.ndarray:
        """How many batches each cluster leads: the fewest in which every sample has a place."""
        sizes = np.array([len(members) for members in self._members])
        while True:
            leads = _apportion(batches, sizes)
            if np.maximum(sizes - leads * self._from_cluster, 0).sum() <= batches * self._from_pool:
                return leads
            batches += 1

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer of a stage before each of its epochs."""
        self.epoch = self.epochs_before + epoch

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
        pool = rng.permutation(np.concatenate(leftover))
        missing = len(self) * self._from_pool - len(pool)
        everyone = np.concatenate(self._members)
        fill = rng.choice(everyone, missing, replace=missing > len(everyone))
        pools = np.concatenate([pool, fill]).reshape(len(self), self._from_pool)
        for lead, rest in zip(rng.permutation(len(led)), pools, strict=True):
            yield [*led[lead].tolist(), *rest.tolist()]

    def composition(self) -> dict[str, float]:
        """What the batches of this epoch are made of, over all processes.

        Returns:
            "batches" and "samples" of the epoch, the "distinct" ones among them, and shares of the
            ordered pairs i != j within a batch: "same_class_pairs", and "hard_pairs" of
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
    """The members in random order, again and again, until there are at least `length`."""
    rounds = max(1, math.ceil(length / len(members)))
    return np.concatenate([rng.permutation(members) for _ in range(rounds)])


def _equal_pairs(batches: np.ndarray) -> int:
    """How many ordered pairs i != j of a row hold the same value, over all rows of (batches, B)."""
    return sum(int((batch[:, None] == batch).sum()) for batch in batches) - batches.size
