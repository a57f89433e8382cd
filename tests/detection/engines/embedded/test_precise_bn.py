from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from detection.engines.embedded.norm import FrozenBatchNorm2d, NaiveSyncBatchNorm2d
from detection.engines.embedded.precise_bn import update_bn_statistics
from moco.errors import DataError

SIZES = ((2, 4, 5), (1, 3, 7), (3, 6, 2))  # images, height, width


def make_batches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num, 3, height, width, generator=generator) * (index + 1) + index
        for index, (num, height, width) in enumerate(SIZES)
    ]


def pixels(batches: list[torch.Tensor]) -> torch.Tensor:
    """All pixels [N, C] of all batches."""
    return torch.cat([batch.movedim(1, -1).flatten(0, -2) for batch in batches])


def test_statistics_are_those_of_all_pixels_together():
    norm = nn.BatchNorm2d(3)
    second = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, FrozenBatchNorm2d(3), second)
    batches = make_batches()
    update_bn_statistics(model, batches, num_iters=3)
    values = pixels(batches)
    torch.testing.assert_close(norm.running_mean, values.mean(0))
    torch.testing.assert_close(norm.running_var, values.var(0, correction=0))
    # The second layer sees normalised batches.
    torch.testing.assert_close(second.running_mean, torch.zeros(3), atol=1e-5, rtol=0)
    # Batches weigh by their pixels: a plain mean of batch means is another number.
    equal_weights = torch.stack([pixels([batch]).mean(0) for batch in batches]).mean(0)
    assert not torch.allclose(norm.running_mean, equal_weights, rtol=1e-2)


def snapshot(model: nn.Module):
    return (
        [module.training for module in model.modules()],
        [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)],
        [len(module._forward_pre_hooks) for module in model.modules()],
    )


def mixed_model() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(), nn.BatchNorm2d(3))
    model.eval()
    model[1].train()
    return model


def test_flags_momentum_and_hooks_are_restored():
    model = mixed_model()
    before = snapshot(model)
    update_bn_statistics(model, make_batches(), num_iters=2)
    assert snapshot(model) == before


def test_after_an_error_everything_is_as_before():
    model = mixed_model()
    before = snapshot(model)

    def failing():
        yield make_batches()[0]
        raise DataError("image 7: unreadable")

    with pytest.raises(DataError, match="image 7"):
        update_bn_statistics(model, failing(), num_iters=2)
    assert snapshot(model) == before
    assert model[0].running_mean.tolist() == [0.0] * 3
    assert model[2].running_var.tolist() == [1.0] * 3


def test_too_few_batches_are_an_error():
    with pytest.raises(DataError, match="ended after 3 batches; TEST.PRECISE_BN.NUM_ITER = 4"):
        update_bn_statistics(nn.Sequential(nn.BatchNorm2d(3)), make_batches(), num_iters=4)


def test_no_more_batches_are_drawn_than_needed_and_weights_stay():
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = iter(make_batches())
    update_bn_statistics(model, batches, num_iters=2)
    assert len(list(batches)) == 1
    assert model[0].weight.tolist() == [1.0] * 3 and model[0].bias.tolist() == [0.0] * 3


def test_a_model_without_trainable_norms_is_not_run():
    update_bn_statistics(nn.Sequential(FrozenBatchNorm2d(3)), iter([]), num_iters=5)


class Sometimes(nn.Module):
    """A norm that the first batch does not reach, and one that never is."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.never = nn.BatchNorm2d(3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x) if self.calls > 1 else x


def test_a_norm_counts_only_the_batches_it_saw():
    model = Sometimes()
    batches = make_batches()
    update_bn_statistics(model, batches, num_iters=3)
    torch.testing.assert_close(model.norm.running_mean, pixels(batches[1:]).mean(0))
    assert model.never.running_var.tolist() == [1.0] * 3


def _rank_batches(rank: int) -> list[torch.Tensor]:
    """The second rank's batches have other sizes, and more pixels."""
    if rank == 0:
        return make_batches(0)
    return [batch.repeat(2, 1, 1, 3) + 5 * torch.rand(1) for batch in make_batches(1)]


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rdzv", rank=rank, world_size=2)
    torch.manual_seed(rank)
    batches = _rank_batches(rank)
    results = {"batches": batches}
    for kind in (nn.BatchNorm2d, NaiveSyncBatchNorm2d):
        model = nn.Sequential(kind(3))
        update_bn_statistics(model, batches, num_iters=3)
        results[kind.__name__] = [model[0].running_mean, model[0].running_var]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_agree_and_weigh_by_the_pixels_of_both(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in ("BatchNorm2d", "NaiveSyncBatchNorm2d"):
        for own, other in zip(first[kind], second[kind], strict=True):
            assert torch.equal(own, other), kind
    # Plain batch norm: exactly the statistics of all pixels of both ranks.
    values = pixels([*first["batches"], *second["batches"]])
    mean, variance = first["BatchNorm2d"]
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(variance, values.var(0, correction=0), rtol=1e-5, atol=1e-5)
    # naiveSyncBN: within a batch ranks weigh the same, batches weigh by the pixels of both ranks.
    pairs = list(zip(first["batches"], second["batches"], strict=True))
    batch_means = torch.stack([(pixels([a]).mean(0) + pixels([b]).mean(0)) / 2 for a, b in pairs])
    counts = torch.tensor([float(len(pixels([a])) + len(pixels([b]))) for a, b in pairs])
    expected = (batch_means * counts[:, None]).sum(0) / counts.sum()
    torch.testing.assert_close(first["NaiveSyncBatchNorm2d"][0], expected)
    assert not torch.allclose(first["NaiveSyncBatchNorm2d"][0], mean, rtol=1e-2)
