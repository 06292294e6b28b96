"""Pairs of nearly equal bit strings among many, without comparing all with all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def near_pairs(hashes: Sequence[str], max_distance: int) -> NDArray[np.int64]:
    """All pairs of hashes that differ in at most `max_distance` bits; none is missed.

    Cut into `max_distance` + 1 bands, two such hashes are equal in one band at least, so only
    pairs that share a band are compared. 10,000 random hashes take a fraction of a second.

    Args:
        hashes: hexadecimal, all of one length, a multiple of 16 digits.

    Returns:
        int64, shape (num_pairs, 2): indices i < j, sorted, each pair once.
    """
    if len(hashes) < 2:
        return np.empty((0, 2), dtype=np.int64)
    packed = np.array([list(bytes.fromhex(text)) for text in hashes], dtype=np.uint8)
    words = packed.view(np.uint64)  # (N, bits / 64), for counting differing bits
    bits = np.unpackbits(packed, axis=1)  # (N, bits)
    found = [
        _close_pairs(words, candidates, max_distance)
        for band in np.array_split(bits, max_distance + 1, axis=1)
        for candidates in _equal_pairs(np.packbits(band, axis=1))
    ]
    pairs = np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)
    return np.unique(pairs, axis=0)


def _equal_pairs(rows: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Pairs of equal rows in blocks of shape (n, 2): neighbours in sorted order, next but one, …"""
    _, keys = np.unique(rows, axis=0, return_inverse=True)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    start = np.arange(len(order))
    blocks: list[NDArray[np.int64]] = []
    distance = 1
    while True:
        start = start[start < len(order) - distance]
        start = start[keys[start] == keys[start + distance]]
        if not len(start):
            return blocks
        blocks.append(np.stack([order[start], order[start + distance]], axis=1))
        distance += 1


def _close_pairs(
    words: NDArray[np.uint64], pairs: NDArray[np.int64], max_distance: int
) -> NDArray[np.int64]:
    distance = np.bitwise_count(words[pairs[:, 0]] ^ words[pairs[:, 1]]).sum(axis=1)
    close: NDArray[np.int64] = np.sort(pairs[distance <= max_distance], axis=1)
    return close
