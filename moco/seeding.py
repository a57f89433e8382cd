"""Stateless randomness: every draw is a function of (seed, purpose, indices).

No generator lives across steps, so exact resume needs no RNG snapshot, and the number of
loader workers or processes changes no pixel.
"""

from __future__ import annotations

import hashlib
import random

import torch

_MASK_63 = (1 << 63) - 1


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A seed in [0, 2^63) for one draw.

    Args:
        seed: the run's seed.
        purpose: what is drawn, e.g. "augment" or "epoch-order"; different purposes are
            independent.
        indices: what the draw belongs to, e.g. epoch, sample index, view.
    """
    text = "|".join([str(int(seed)), purpose, *(str(int(i)) for i in indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK_63


def python_random(seed: int, purpose: str, *indices: int) -> random.Random:
    """A `random.Random` for the scalar draws of one sample."""
    return random.Random(derive_seed(seed, purpose, *indices))


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU `torch.Generator` for tensor draws (permutations, initial noise)."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, purpose, *indices))
    return generator
