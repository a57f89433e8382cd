"""Rows by which images are known again: their very files, or re-encoded or resized copies.

A row has `ROW_BYTES` bytes: `EXACT_BYTES` of a file's bytes, then `NEAR_BYTES` of its pixels, a
perceptual hash (`moco.data.image_hash` makes both). Zeros in the place of the second stand for no
such hash. What the threshold finds and misses: docs/LEAKS.md.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

EXACT_BYTES, NEAR_BYTES = 8, 16
ROW_BYTES = EXACT_BYTES + NEAR_BYTES
MAX_DISTANCE = 12  # bits in which two near copies may differ
DIFFERENT, NEAR, EXACT = 0, 1, 2

_NUM_BITS = 8 * NEAR_BYTES
_BLOCK = 4096  # rows of each side that are compared at a time


class Matches(NamedTuple):
    """Of each row: kind int8 [M], DIFFERENT, NEAR or EXACT; partner int64 [M], the number of the
    row it matches, -1 where none; distance int64 [M], in bits, of near copies."""

    kind: np.ndarray
    partner: np.ndarray
    distance: np.ndarray


def has_pixels(rows: np.ndarray) -> np.ndarray:
    """bool [N]: which rows have a perceptual hash."""
    return rows[:, EXACT_BYTES:].any(axis=1)


def match(rows: np.ndarray, pool: np.ndarray, max_distance: int = MAX_DISTANCE) -> Matches:
    """Which of `rows` [M, 24] are in `pool` [P, 24]: by their bytes, else as the nearest copy of at
    most `max_distance` bits. Compares all pairs: 5,000 rows with 1.3 million take some 20 s on two
    cores.
    """
    partner = _same_bytes(rows, pool)
    kind = np.where(partner >= 0, EXACT, DIFFERENT).astype(np.int8)
    distance = np.zeros(len(rows), np.int64)
    asked = np.flatnonzero((partner < 0) & has_pixels(rows))
    known = np.flatnonzero(has_pixels(pool))
    for first in range(0, len(asked) if len(known) else 0, _BLOCK):
        block = asked[first : first + _BLOCK]
        nearest, place = _nearest(rows[block, EXACT_BYTES:], pool, known)
        near = nearest <= max_distance
        kind[block[near]] = NEAR
        partner[block[near]], distance[block[near]] = place[near], nearest[near]
    return Matches(kind, partner, distance)


def _same_bytes(rows: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """int64 [M]: a row of the pool with the same exact hash; -1 where there is none."""
    found = np.full(len(rows), -1, np.int64)
    if len(pool) and len(rows):
        theirs, ours = (
            np.ascontiguousarray(r[:, :EXACT_BYTES]).view("<u8").ravel() for r in (pool, rows)
        )
        order = np.argsort(theirs, kind="stable")
        place = np.minimum(np.searchsorted(theirs[order], ours), len(order) - 1)
        same = theirs[order[place]] == ours
        found[same] = order[place[same]]
    return found


def _nearest(hashes: np.ndarray, pool: np.ndarray, known: np.ndarray):
    """Distance in bits to the nearest of `pool[known]`, and its number, int64 [M] each."""
    signs = _signs(hashes)
    best = torch.full((len(hashes),), -float("inf"))
    place = torch.zeros(len(hashes), dtype=torch.int64)
    for first in range(0, len(known), _BLOCK):
        block = known[first : first + _BLOCK]
        agreement, at = (signs @ _signs(pool[block, EXACT_BYTES:]).T).max(dim=1)
        better = agreement > best
        best[better] = agreement[better]
        place[better] = torch.from_numpy(block)[at[better]]
    return ((_NUM_BITS - best) / 2).round().long().numpy(), place.numpy()


def _signs(hashes: np.ndarray) -> torch.Tensor:
    """float32 [N, 128] of -1 and 1: the product of two is 128 minus twice their distance."""
    return torch.from_numpy(np.unpackbits(hashes, axis=1).astype(np.float32) * 2 - 1)
