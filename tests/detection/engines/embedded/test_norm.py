from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from detection.engines.embedded.norm import (
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm2d,
    build_norm,
    freeze,
)
from moco.errors import ConfigError


def test_names_build_their_layers_and_others_are_refused():
    assert type(build_norm("BN", 4)) is nn.BatchNorm2d
    assert type(build_norm("SyncBN", 4)) is nn.SyncBatchNorm
    assert type(build_norm("naiveSyncBN", 4)) is NaiveSyncBatchNorm2d
    assert type(build_norm("FrozenBN", 4)) is FrozenBatchNorm2d
    assert build_norm("", 4) is None
    with pytest.raises(ConfigError, match="'GN'; allowed: BN, FrozenBN, SyncBN, naiveSyncBN"):
        build_norm("GN", 4)


def test_a_fresh_frozen_norm_is_the_identity_and_has_only_buffers():
    norm = FrozenBatchNorm2d(3)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(norm(x), x, rtol=0, atol=1e-6)
    assert list(norm.parameters()) == []
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_converted_norm_computes_what_the_trained_one_does_in_eval_mode(needs_gradient):
    trained = nn.BatchNorm2d(3)
    for values in (trained.weight, trained.bias, trained.running_mean, trained.running_var):
        nn.init.uniform_(values, 0.5, 2.0)
    frozen = FrozenBatchNorm2d.converted_from(trained)
    x = torch.randn(2, 3, 4, 5, requires_grad=needs_gradient)
    torch.testing.assert_close(frozen(x), trained.eval()(x), rtol=1e-5, atol=1e-6)
    assert list(frozen.state_dict()) == list(trained.state_dict())
    # Training does not move it.
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen.train()(x)
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())


def test_freeze_fixes_weights_and_converts_every_trainable_norm():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.SyncBatchNorm(4)))
    freeze(block)
    assert not any(p.requires_grad for p in block.parameters())
    assert type(block[1]) is FrozenBatchNorm2d
    assert type(block[2][0]) is FrozenBatchNorm2d


def test_naive_sync_norm_alone_is_plain_batch_norm():
    x = torch.randn(4, 3, 5, 6)
    naive, plain = NaiveSyncBatchNorm2d(3), nn.BatchNorm2d(3)
    assert torch.equal(naive(x), plain(x))
    assert torch.equal(naive.running_var, plain.running_var)


def _images() -> torch.Tensor:
    return torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(7)) * 2 + 1


def _loss(out: torch.Tensor, first: int) -> torch.Tensor:
    index = torch.arange(out.numel(), dtype=torch.float32).view_as(out) + first
    return (out.float() * torch.sin(index)).sum()


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rdzv", rank=rank, world_size=2)
    norm = NaiveSyncBatchNorm2d(3)
    x = _images()[2 * rank : 2 * rank + 2].clone().requires_grad_()
    out = norm(x)
    _loss(out, first=rank * x.numel()).backward()
    half = NaiveSyncBatchNorm2d(3)
    half_out = half(x.detach().bfloat16())
    torch.save(
        {
            "out": out.detach(),
            "x": x.grad,
            "weight": norm.weight.grad,
            "bias": norm.bias.grad,
            "mean": norm.running_mean,
            "variance": norm.running_var,
            "half_dtype": str(half_out.dtype),
            "half_mean": half.running_mean,
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_naive_sync_norm_on_two_ranks_is_one_process_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    x = _images().requires_grad_()
    plain = nn.BatchNorm2d(3)
    out = plain(x)
    _loss(out, first=0).backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([first["out"], second["out"]]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), x.grad, **close)
    # Parameters get each rank's own part; data parallel training adds these up.
    torch.testing.assert_close(first["weight"] + second["weight"], plain.weight.grad, **close)
    torch.testing.assert_close(first["bias"] + second["bias"], plain.bias.grad, **close)
    assert torch.equal(first["mean"], second["mean"])
    torch.testing.assert_close(first["mean"], plain.running_mean, **close)
    # The variance that is kept is the biased one: 120 values a channel.
    biased = 0.9 + (plain.running_var - 0.9) * 119 / 120
    assert torch.equal(first["variance"], second["variance"])
    torch.testing.assert_close(first["variance"], biased, rtol=1e-5, atol=0)
    assert not torch.allclose(first["variance"], plain.running_var, rtol=1e-5, atol=0)
    # bfloat16 in, bfloat16 out, statistics in float32.
    assert first["half_dtype"] == "torch.bfloat16"
    torch.testing.assert_close(first["half_mean"], plain.running_mean, rtol=0.02, atol=1e-3)
