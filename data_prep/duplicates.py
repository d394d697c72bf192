"""Pictures that are the same, or nearly: which, and in which groups."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import datasets
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.preprocessing import normalize

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
# image_embeds (N, D) of that many pictures
Encode = Callable[[Iterable[Image.Image], int], np.ndarray]


@dataclass(frozen=True)
class Fingerprints:
    """What tells whether two pictures are the same."""

    # (2, N, 18) uint8, of pictures and their mirror images: who trains with flips trains on both
    hashes: np.ndarray
    image_embeds: np.ndarray  # (N, D) float32, centred, then of unit length
    # to be reached at the distances CERTAIN and POSSIBLE, linearly in between, and beyond
    cosines: tuple[float, float, float]

    @classmethod
    def make(cls, rows: datasets.Dataset, image_embeds: np.ndarray, encode: Encode) -> Self:
        """Learns `cosines` from copies of `COPIES` of the pictures, cropped and recompressed.

        They depend on the base model: what 99.9 % of different pictures stay below, what 90 % of
        the copies reach, and what half of them do.

        Args:
            rows: image, phash and mirrored_phash of N pictures.
            image_embeds: (N, D) of unit length, made by `encode`.
        """
        mean = image_embeds.mean(axis=0)
        centred = normalize(image_embeds - mean)
        texts = rows["phash"][:] + rows["mirrored_phash"][:]
        hashes = np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(2, len(rows), -1)
        chosen = np.unique(np.linspace(0, len(centred) - 1, COPIES).round().astype(int))
        pictures = rows.select(chosen).cast_column("image", datasets.Image())
        copied = (_copy(row["image"]) for row in pictures)
        copies = normalize(encode(copied, len(chosen)) - mean)
        cosine = copies @ centred[chosen].T  # (COPIES, COPIES) at most
        own = hashes[0, chosen]
        different = cosine[np.bitwise_count(own[:, None] ^ own).sum(axis=2) > REMOTE]
        unlike = np.quantile(different, 0.999) if different.size else -1.0
        cosines = np.maximum.accumulate([unlike, *np.quantile(cosine.diagonal(), [0.1, 0.5])])
        return cls(hashes, centred, tuple(cosines.tolist()))

    def near_duplicates(self) -> np.ndarray:
        """All pairs of pictures that are the same, (P, 2) int; compares every pair, in blocks."""
        plain, mirrored = np.unpackbits(self.hashes, axis=2).astype(np.float32) * 2 - 1
        found = [np.empty((0, 2), dtype=np.int64)]
        size = max(1, CELLS // len(plain))
        for start in range(0, len(plain), size):
            own = plain[start : start + size]
            # A product of bits as +1 and -1 is their number less twice the Hamming distance.
            products = own @ plain[start:].T, own @ mirrored[start:].T - 2 * MIRROR_PENALTY
            distances = (plain.shape[1] - np.maximum(*products)) / 2
            pairs = np.argwhere(np.triu(distances <= REMOTE, k=1))
            distance = distances[tuple(pairs.T)]
            same = distance <= CERTAIN
            doubt = np.flatnonzero(~same)
            first, second = self.image_embeds[start + pairs[doubt].T]
            needed = np.interp(distance[doubt], (CERTAIN, POSSIBLE, POSSIBLE + 1), self.cosines)
            same[doubt] = np.einsum("pd,pd->p", first, second) >= needed
            found.append(start + pairs[same])
        return np.concatenate(found)

    def most_alike_across(self, parts: np.ndarray, count: int) -> list[tuple[int, int, float]]:
        """The `count` pairs in different `parts` (N,) of the highest cosine; "" is no part."""
        used = np.flatnonzero(parts != "")
        image_embeds, part = self.image_embeds[used], np.unique(parts[used], return_inverse=True)[1]
        best: list[tuple[int, int, float]] = []
        size = max(1, CELLS // len(used))
        for start in range(0, len(used), size):
            cosine = image_embeds[start : start + size] @ image_embeds.T
            cosine[part[start : start + size, None] >= part] = -2  # each pair counts once
            most = min(count, cosine.size)
            top = np.argpartition(cosine.ravel(), -most)[-most:]
            for row, column in zip(*np.unravel_index(top, cosine.shape), strict=True):
                if cosine[row, column] > -2:
                    pair = int(used[start + row]), int(used[column])
                    best.append((*pair, float(cosine[row, column])))
        return sorted(best, key=lambda pair: -pair[2])[:count]


def connected_groups(pairs: np.ndarray, count: int) -> np.ndarray:
    """The group of each of `count` pictures, (N,) int: those that pairs (P, 2) connect."""
    graph = coo_array((np.ones(len(pairs), bool), tuple(pairs.T)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _copy(image: Image.Image) -> Image.Image:
    """A picture as someone else may have saved it: cropped by up to 4 %, in a coarser JPEG."""
    image = image.convert("RGB")
    width, height = image.size
    box = (width * 0.04, height * 0.02, width * 0.98, height * 0.97)
    encoded = io.BytesIO()
    image.resize(image.size, Image.Resampling.BICUBIC, box).save(encoded, "JPEG", quality=60)
    return Image.open(encoded)
