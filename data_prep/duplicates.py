"""Pictures that are the same, or nearly: which, and in which groups."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Bits of 144 in which the perceptual hashes of two pictures differ. Measured on façades and
# photographs, see docs/lab_notebook.md.
CERTAIN = 16  # up to here they are the same picture
# up to here they are if the base model finds them alike enough, the more alike the further apart
POSSIBLE = 32
REMOTE = 40  # up to here they are if it finds them as alike as most copies
# bits; things that are symmetric, such as façades, resemble each other's mirror images
MIRROR_PENALTY = 8
COPIES = 256  # made of so many pictures, to learn how alike copies are
CELLS = 1 << 22  # pairs that are compared at a time


@dataclass(frozen=True)
class Fingerprints:
    """What tells whether two pictures are the same.

    Attributes:
        hashes: (2, N, 18) uint8, the perceptual hashes of the pictures and of their mirror images:
            who trains with flips trains on both.
        image_embeds: (N, D) float32, of unit length, centred before.
        cosines: what two pictures must reach at the distances CERTAIN and POSSIBLE, linearly in
            between, and beyond.
    """

    hashes: np.ndarray
    image_embeds: np.ndarray
    cosines: tuple[float, float, float]

    @classmethod
    def make(
        cls,
        phashes: Sequence[str],
        mirrored_phashes: Sequence[str],
        image_embeds: np.ndarray,
        picture: Callable[[int], Image.Image],
        encode: Callable[[list[Image.Image]], np.ndarray],
    ) -> Fingerprints:
        """Learns `cosines` from copies of `COPIES` of the pictures, cropped and recompressed.

        How far a crop moves an embedding, and how far apart pictures of one niche lie, depends on
        the base model. They are what 99.9 % of different pictures stay below, what 90 % of the
        copies reach, and what half of them do.
        """
        mean = image_embeds.mean(axis=0)
        centred = _unit(image_embeds - mean)
        hashes = np.stack([_from_hex(phashes), _from_hex(mirrored_phashes)])
        chosen = np.unique(np.linspace(0, len(centred) - 1, COPIES).round().astype(int))
        copies = _unit(encode([_copy(picture(int(index))) for index in chosen]) - mean)
        cosine = copies @ centred[chosen].T  # (COPIES, COPIES) at most
        own = hashes[0, chosen]
        different = cosine[np.bitwise_count(own[:, None] ^ own).sum(axis=2) > REMOTE]
        unlike = np.quantile(different, 0.999) if different.size else -1.0
        cosines = np.maximum.accumulate([unlike, *np.quantile(cosine.diagonal(), [0.1, 0.5])])
        return cls(hashes, centred, tuple(cosines.tolist()))

    def take(self, indices: np.ndarray) -> Fingerprints:
        """Those of some of the pictures; `indices` (M,) int."""
        return replace(
            self, hashes=self.hashes[:, indices], image_embeds=self.image_embeds[indices]
        )

    def same(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether the pictures `first` (P,) and `second` (P,) are the same, (P,) bool."""
        plain = np.bitwise_count(self.hashes[0, first] ^ self.hashes[0, second]).sum(axis=1)
        mirrored = np.bitwise_count(self.hashes[0, first] ^ self.hashes[1, second]).sum(axis=1)
        distance = np.minimum(plain, mirrored + MIRROR_PENALTY)
        same = distance <= CERTAIN
        doubt = np.flatnonzero((distance <= REMOTE) & ~same)
        cosine = np.einsum(
            "pd,pd->p", self.image_embeds[first[doubt]], self.image_embeds[second[doubt]]
        )
        needed = np.interp(distance[doubt], (CERTAIN, POSSIBLE, POSSIBLE + 1), self.cosines)
        same[doubt] = cosine >= needed
        return same

    def near_duplicates(self) -> np.ndarray:
        """All pairs of pictures that are the same, (P, 2) int; compares every pair, in blocks.

        A matrix product of bits as +1 and -1 tells the Hamming distances of a block at once.
        """
        plain, mirrored = np.unpackbits(self.hashes, axis=2).astype(np.float32) * 2 - 1
        least = plain.shape[1] - 2 * REMOTE  # the product of two hashes at that distance
        found = [np.empty((0, 2), dtype=np.int64)]
        size = max(1, CELLS // len(plain))
        for start in range(0, len(plain), size):
            own = plain[start : start + size]
            near = np.maximum(own @ plain[start:].T, own @ mirrored[start:].T) >= least
            first, second = near.nonzero()
            pairs = start + np.stack([first, second], axis=1)[first < second]
            found.append(pairs[self.same(*pairs.T)])
        return np.concatenate(found)

    def most_alike_across(self, parts: np.ndarray, count: int) -> list[tuple[int, int, float]]:
        """The `count` pairs in different `parts` (N,) with the highest cosine, to be looked at."""
        best: list[tuple[int, int, float]] = []
        for own, others in _blocks(parts):
            cosine = self.image_embeds[own] @ self.image_embeds[others].T
            top = np.argpartition(cosine.ravel(), -min(count, cosine.size))[
                -min(count, cosine.size) :
            ]
            rows, columns = np.divmod(top, len(others))
            best += zip(
                own[rows].tolist(),
                others[columns].tolist(),
                cosine[rows, columns].tolist(),
                strict=True,
            )
        return sorted(best, key=lambda pair: -pair[2])[:count]


def connected_groups(pairs: np.ndarray, count: int) -> np.ndarray:
    """The group of each of `count` pictures, (N,) int: those that pairs (P, 2) connect."""
    graph = coo_array(
        (np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count)
    )
    return connected_components(graph, directed=False)[1]


def _blocks(parts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs in different parts as blocks: some of one part, all of the later parts."""
    for part in np.unique(parts)[:-1]:
        own, later = np.flatnonzero(parts == part), np.flatnonzero(parts > part)
        size = max(1, CELLS // len(later))
        for start in range(0, len(own), size):
            yield own[start : start + size], later


def _copy(image: Image.Image) -> Image.Image:
    """A picture as someone else may have saved it: cropped by up to 4 %, in a coarser JPEG."""
    image = image.convert("RGB")
    width, height = image.size
    box = (width * 0.04, height * 0.02, width * 0.98, height * 0.97)
    encoded = io.BytesIO()
    image.resize(image.size, Image.Resampling.BICUBIC, box).save(encoded, "JPEG", quality=60)
    return Image.open(encoded)


def _from_hex(phashes: Sequence[str]) -> np.ndarray:
    return np.array([list(bytes.fromhex(phash)) for phash in phashes], dtype=np.uint8)


def _unit(embeds: np.ndarray) -> np.ndarray:
    return embeds / np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), 1e-12)
