"""Seeds depend on all of (seed, purpose, indices) and on nothing else."""

import torch

from moco.seeding import derive_seed, python_random, torch_generator


def test_seeds_are_pinned_and_in_range():
    # Pinned: another value would change every run's pixels.
    assert derive_seed(0, "augment", 1, 2, 0) == 8198834558198058003
    assert derive_seed(7, "epoch-order", 3) == 1017762046901244831
    seeds = [derive_seed(s, p, e, i) for s in (0, 1) for p in "ab" for e in (0, 1) for i in (0, 1)]
    assert len(set(seeds)) == 16
    assert all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(0, "a", 1, 23) != derive_seed(0, "a", 12, 3)


def test_generators_follow_the_seed():
    assert python_random(1, "x").random() == python_random(1, "x").random()
    a, b = (torch.randperm(50, generator=torch_generator(s, "x")) for s in (1, 2))
    assert not torch.equal(a, b)
