"""Two processes, ended at any point, and every method's variant: the same bits on both."""

import os
import resource

import pytest
import tiny
import torch
from faults import STOPS, Stop
from pretrain_runs import (
    arguments,
    make_images,
    stop_and_continue,
    undisturbed,
)
from processes import in_processes
from tiny import VARIANTS, method_config

from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.errors import DistributedError
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer

# Every second of those of one process, so that each kind is there, and one of the other rank.
STOPS_OF_TWO = (*STOPS[::2], Stop("kill -9", 6, rank=1), Stop("SIGTERM", 5, rank=1))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    return undisturbed(images, tmp_path_factory.mktemp("whole"), 2)


@pytest.mark.parametrize(
    "stop", STOPS_OF_TWO, ids=lambda stop: f"{stop} at {stop.step} of {stop.rank}"
)
def test_any_stop_continues_to_the_same_bits(stop, images, uninterrupted, tmp_path):
    words = arguments(images, tmp_path / "run", "--resume")
    found = stop_and_continue(words, tmp_path / "run", 2, stop)
    if stop.how == "SIGTERM":  # whoever gets it, both stop
        assert found["ended"] == [143, 143]
    else:
        killed = {0, 1} if stop.rank is None else {stop.rank}
        assert all((found["ended"][rank] == -9) == (rank in killed) for rank in range(2))
        assert 0 not in found["ended"]
    assert (found["digest"], found["names"]) == uninterrupted


def _states(trainer):
    tensors = dict(trainer.method.state_dict())
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{n}": torch.as_tensor(v) for n, v in entry.items()}
    return tensors


def _every_variant(rank, images, folder):
    """variant -> names of what differs between the resumed and the uninterrupted run's end."""
    found = {}
    for variant in VARIANTS:

        def trainer(name, variant=variant):
            return Trainer(
                method_config(variant, TRAIN__EPOCHS=2), find_images(images),
                folder / variant / name, ProcessInfo(rank, 2, rank, torch.device("cpu")),
                resume=True, say=lambda line: None,
            )  # fmt: skip

        code = trainer("stopped").train([tiny.StopAfter(2)] if rank == 1 else [])
        resumed, whole = trainer("stopped"), trainer("whole")
        assert (code, resumed.first_step) == (143, 3)
        resumed.train()
        whole.train()
        a, b = _states(resumed), _states(whole)
        assert a.keys() == b.keys()
        found[variant] = [name for name in a if not torch.equal(a[name], b[name])]
    return found


def test_every_variant_resumes_to_the_same_bits_on_both_ranks(images, tmp_path):
    """What is saved is rank 0's. Of it only running statistics are a rank's own, unread in
    training, so on rank 1 they alone may differ."""
    first, second = in_processes(_every_variant, tmp_path, images, tmp_path / "runs")
    assert first == {variant: [] for variant in VARIANTS}
    for variant, names in second.items():
        assert all(name.endswith(("running_mean", "running_var")) for name in names), variant
    # Control: it sees them differ where rank 0's statistics were given to rank 1.
    assert second["moco"] and second["memory_bank"]


def _start_apart(rank, images, folder):
    """As on two machines that do not share a disk: rank 1 finds no checkpoint."""

    def trainer(where):
        return Trainer(
            method_config("moco", TRAIN__EPOCHS=1), find_images(images), where,
            ProcessInfo(rank, 2, rank, torch.device("cpu")), resume=True, say=lambda line: None,
        )  # fmt: skip

    trainer(folder / "shared").train()
    with pytest.raises(
        DistributedError, match=r"different steps \(by rank: \[4, 0\]\).*shared fil"
    ):
        trainer(folder / "shared" if rank == 0 else folder / "own")
    return True


def test_ranks_that_would_continue_at_different_steps_are_refused(images, tmp_path):
    assert in_processes(_start_apart, tmp_path, images, tmp_path / "runs") == [True, True]


def _full_disk(rank, images, folder):
    """Rank 0's second checkpoint does not fit; returns what each rank raises."""
    trainer = Trainer(
        method_config("moco", TRAIN__EPOCHS=2), find_images(images), folder,
        ProcessInfo(rank, 2, rank, torch.device("cpu")), say=lambda line: None,
    )  # fmt: skip

    class Fill:
        def on_step(self, record):
            pass

        def on_epoch(self, record):
            if record.epoch == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))

    try:
        trainer.train([Fill()])
    except ckpt.CheckpointError as error:
        return str(error)
    return ""


def test_a_full_disk_is_one_line_on_all_ranks_and_the_old_checkpoint_stays(images, tmp_path):
    first, second = in_processes(_full_disk, tmp_path, images, tmp_path / "run")
    assert first == second
    assert "checkpoint_0001.pth.tar: cannot be written" in first and "File too large" in first
    assert "bytes are needed" in first and "are free there" in first
    path, manifest, refused = ckpt.latest_verified(tmp_path / "run")
    assert (path.name, manifest["step"], refused) == ("checkpoint_0000.pth.tar", 4, [])
    assert sorted(os.listdir(tmp_path / "run")) == [path.name, f"{path.name}.manifest.json"]
