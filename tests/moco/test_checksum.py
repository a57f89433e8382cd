"""The checksum of tensors: what it must notice, and its values worked by another formula."""

from __future__ import annotations

import pytest
import torch

import moco.checksum
from moco.checksum import checksum, checksums

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def by_hand(words: list[int]) -> int:
    """The definition in Python's whole numbers."""
    total = 0
    for position, word in enumerate(words):
        mixed = (word * 0x9E3779B97F4A7C15 + position * 0xC2B2AE3D27D4EB4F) % 2**64
        total += mixed ^ (mixed >> 32)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def test_is_the_definition_in_whole_numbers(monkeypatch):
    words = torch.randint(-(2**31), 2**31, (1000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([words, torch.tensor([0, -1, 2**31 - 1, -(2**31)])]).to(torch.int32)
    expected = by_hand(words.tolist())
    assert checksum(words).item() == expected
    assert checksum(words.view(torch.float32)).item() == expected
    monkeypatch.setattr(moco.checksum, "_CPU_CHUNK", 37)
    assert checksum(words).item() == expected
    assert checksum(torch.empty(0)).item() == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_single_flipped_bit_is_noticed(dtype):
    draws = torch.Generator().manual_seed(1)
    tensor = torch.randint(0, 2, (40,), generator=draws).to(dtype)
    if dtype.is_floating_point:
        tensor = torch.randn(40, generator=draws, dtype=torch.float64).to(dtype)
    raw, before = tensor.view(torch.uint8), checksum(tensor).item()
    for byte in range(len(raw)):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert checksum(tensor).item() != before
            raw[byte] ^= 1 << bit
    assert checksum(tensor).item() == before


def test_swaps_signs_of_zero_and_nans_are_noticed():
    tensor = torch.tensor([1.0, 2.0, 0.0, float("nan")])
    seen = {checksum(tensor[list(order)]).item() for order in ([0, 1, 2, 3], [1, 0, 2, 3])}
    seen |= {checksum(torch.tensor([1.0, 2.0, -0.0, float("nan")])).item()}
    seen |= {checksum(torch.tensor([1.0, 2.0, 0.0, float("inf")])).item()}
    assert len(seen) == 4
    assert checksum(tensor).item() == checksum(tensor.clone()).item()  # NaN bits are bits


def test_memory_format_does_not_count_and_names_shapes_types_do():
    weight = torch.randn(4, 3, 5, 5)
    assert checksum(weight) == checksum(weight.to(memory_format=torch.channels_last))
    first = checksums({"a": weight, "b": torch.ones(2)}, CPU)
    assert first.shape == (3,) and first.dtype == torch.int64
    assert torch.equal(first, checksums({"a": weight.clone(), "b": torch.ones(2)}, CPU))
    for other in (
        {"a": weight, "c": torch.ones(2)},
        {"a": weight.view(12, 25), "b": torch.ones(2)},
        {"a": weight.view(torch.int32), "b": torch.ones(2)},
    ):
        sums = checksums(other, CPU)
        assert sums[0] != first[0] and torch.equal(sums[1:], first[1:])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    state = {"a": torch.randn(3_000_001), "b": torch.arange(7), "c": torch.randn(9).bfloat16()}
    on_gpu = {name: tensor.cuda() for name, tensor in state.items()}
    assert torch.equal(checksums(on_gpu, torch.device("cuda")).cpu(), checksums(state, CPU))
