"""Groups of pictures that are the same, or nearly."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_DISTANCE = 24  # bits of 144 in which the perceptual hashes of near-duplicates may differ


def near_duplicate_groups(phashes: list[str], block: int = 2048) -> np.ndarray:
    """Connected components of images whose perceptual hashes differ in at most `MAX_DISTANCE` bits.

    Compares all pairs, block by block: memory is linear, time quadratic.

    Args:
        phashes: (N,) hexadecimal, all of one length.

    Returns:
        (N,) int, the group of each image.
    """
    packed = np.array([list(bytes.fromhex(phash)) for phash in phashes], dtype=np.uint8)
    bits = np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1  # (N, bits) of -1 and 1
    agreement = bits.shape[1] - 2 * MAX_DISTANCE  # the inner product of two hashes at MAX_DISTANCE
    first, second = [], []
    for start in range(0, len(bits), block):
        rows, columns = np.nonzero(bits[start : start + block] @ bits[start:].T >= agreement)
        first.append(rows + start)
        second.append(columns + start)
    pairs = np.concatenate(first), np.concatenate(second)
    return connected_components(coo_array((np.ones(len(pairs[0])), pairs), shape=(len(bits),) * 2))[1]
