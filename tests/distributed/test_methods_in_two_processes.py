"""Each mechanism in two processes of 4 images: the same as one of 8, equal on both, resuming."""

import signal

import pytest
import torch
from processes import in_processes
from tiny import VARIANTS, method_config

import moco.methods.end_to_end
from moco import distributed
from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.methods import build_method
from moco.training.optimizer import build_optimizer
from moco.training.trainer import Trainer

RESUMED = ("memory_bank", "moco_v3")  # the others: test_two_processes.py, test_every_method.py


def _train_whole(variant, rank=0, num=1, num_steps=3):
    """Losses and final state in float64, with batch norm over all images of all processes."""
    cfg = method_config(variant, MODEL__BN_SPLITS=1, MODEL__NORM="SyncBN")
    torch.manual_seed(0)
    method = build_method(cfg, num_images=16).double()
    model = method
    if num > 1:
        model = distributed.data_parallel(method, ProcessInfo(rank, num, 0, torch.device("cpu")))
    optimizer = build_optimizer(cfg, method)
    losses, own = [], slice(rank * 8 // num, (rank + 1) * 8 // num)
    for step in range(num_steps):
        draws = torch.Generator().manual_seed(step)
        views = torch.randn(2, 8, 3, 16, 16, generator=draws, dtype=torch.float64)
        index = torch.randperm(16, generator=draws)[:8]
        output = model(*views[:, own], index[own], momentum=0.9, generator=draws)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output, index[own])
        losses.append(output.loss.detach())
    return torch.stack(losses), dict(method.state_dict())


class StopRank1:
    def __init__(self, rank):
        self.rank = rank

    def on_step(self, record):
        if record.step == 1 and self.rank == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_epoch(self, record):
        pass


def _stop_and_resume(variant, rank, images, folder):
    """Whether the resumed run ends in the uninterrupted one's state (rank 0's statistics)."""

    def trainer(name):
        cfg = method_config(variant, TRAIN__EPOCHS=1)
        return Trainer(
            cfg, find_images(images), folder / variant / name,
            ProcessInfo(rank, 2, rank, torch.device("cpu")), resume=True, say=lambda line: None,
        )  # fmt: skip

    stopped = trainer("stopped").train([StopRank1(rank)])
    resumed = trainer("stopped")
    first_step, whole = resumed.first_step, trainer("whole")
    resumed.train()
    whole.train()
    pairs = zip(
        resumed.method.state_dict().items(), whole.method.state_dict().values(), strict=True
    )
    same = all(torch.equal(a, b) for (name, a), b in pairs if rank == 0 or "running" not in name)
    return [stopped, first_step, same]


def _all(rank, images, folder):
    found = {}
    for variant in VARIANTS:
        found[variant] = _train_whole(variant, rank, 2)
    for variant in RESUMED:
        found[f"{variant}, resumed"] = _stop_and_resume(variant, rank, images, folder)
    # Negative control: keys of other processes without gradient.
    moco.methods.end_to_end.all_gather_with_gradient = distributed.all_gather_cat
    found["control"] = _train_whole("end_to_end: SimCLR", rank, 2)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("methods")
    (folder / "images").mkdir()
    for i in range(32):
        image = Image.new("RGB", (20, 20), (8 * i, 255 - 6 * i, 100))
        image.paste((255 - 8 * i, 40, 7 * i), (i % 5, i % 7, i % 5 + 9, i % 7 + 6))
        image.save(folder / "images" / f"{i:02d}.png")
    return in_processes(_all, folder, folder / "images", folder / "runs")


def _close(found, whole):
    return torch.allclose(found.double(), whole.double(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_of_4_equal_one_of_8(ranks, variant):
    losses, state = _train_whole(variant)
    (first_losses, first), (second_losses, second) = (r[variant] for r in ranks)
    assert _close((first_losses + second_losses) / 2, losses)
    assert first.keys() == second.keys() == state.keys()
    for name, tensor in state.items():
        assert _close(first[name], tensor), name
        assert torch.equal(first[name], second[name]), name
    shorter = _train_whole(variant, num_steps=2)[1]
    assert not _close(shorter["encoder_q.fc.0.weight"], state["encoder_q.fc.0.weight"])


def test_negative_control_keys_gathered_without_gradient(ranks):
    state = _train_whole("end_to_end: SimCLR")[1]
    found = ranks[0]["control"][1]
    assert not torch.allclose(found["encoder_q.conv1.weight"], state["encoder_q.conv1.weight"],
                              atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("variant", RESUMED)
def test_a_stop_of_one_process_resumes_exactly(ranks, variant):
    for rank in ranks:
        assert rank[f"{variant}, resumed"] == [128 + signal.SIGTERM, 2, True]
