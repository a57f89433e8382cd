"""NaN in the loss, the gradient, the keys or the queue of one of two processes stops both at once.

Both ways of reading the findings: at once, as on a CPU, and one step later while the device leaves
out the update, as on a GPU (here with torch's fused SGD, which obeys `found_inf` on a CPU too).
"""

import itertools
import signal

import pytest
import tiny
import torch
from poison import (
    BAD_STEP,
    PLACES,
    RANKS,
    make_images,
    make_trainer,
    poisoned,
    replay_lists_the_batch,
)
from processes import in_processes

from moco.training import checkpoint as ckpt

READINGS = ("at once", "a step later")
NAMES = {
    "loss": ("the loss is not finite", "loss=nan"),
    "gradient": ("the gradient is not finite", "gradient of encoder_q.layer1.0.conv1.weight"),
    "keys": ("keys are not finite", "1 of 4 keys"),
    "queue": ("the loss is not finite", "queue itself; loss=nan"),
}


class StopRank1:
    """SIGTERM to one of the processes, when the fifth step is logged."""

    def __init__(self, rank):
        self.rank = rank

    def on_step(self, record):
        if record.step == 5 and self.rank == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_epoch(self, record):
        pass


def _all(rank, images, folder):
    found = {}
    for number, case in enumerate(itertools.product(PLACES, RANKS, READINGS)):
        found["/".join(map(str, case))] = poisoned(rank, images, folder / str(number), *case)
    found["control"] = poisoned(rank, images, folder / "control", "gradient", 0, "blind")
    stopped = make_trainer(rank, images, folder / "stopped", "a step later")
    found["stopped"] = [stopped.train([StopRank1(rank)]), stopped.last_step]
    # The runs of the first and last place go on from what is left of them.
    whole = make_trainer(rank, images, folder / "whole")
    whole.train()
    for number in (0, 12):
        resumed = make_trainer(rank, images, folder / str(number), resume=True)
        found[f"resumed {number}"] = resumed.first_step
        resumed.train()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    base = tmp_path_factory.mktemp("nonfinite")
    make_images(base / "images")
    return base, in_processes(_all, base, base / "images", base / "runs")


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("bad_rank", RANKS)
@pytest.mark.parametrize("place", PLACES)
def test_both_stop_at_the_step_before_its_update(ranks, place, bad_rank, reading):
    found = [rank[f"{place}/{bad_rank}/{reading}"] for rank in ranks[1]]
    later = reading == "a step later"
    for own in found:
        assert own["code"] == 2
        assert own["step"] == BAD_STEP + later  # begun; none is finished after the bad one
        assert own["unchanged"] and own["key encoder is finite"]
        assert own["files"] == [
            "checkpoint_0000.pth.tar", "checkpoint_0000.pth.tar.manifest.json",
            f"nonfinite_step_{BAD_STEP}.pt",
        ]  # fmt: skip
    assert found[0]["message"] == found[1]["message"]
    message, (what, details) = found[0]["message"], NAMES[place]
    assert message.count("\n") == 1
    assert f"error: step {BAD_STEP}: {what} (rank {bad_rank}: {details}" in message
    for part in ("lr=0.0", f"Images of rank {bad_rank}: ", ".png), ", "nonfinite_step_5.pt",
                 "checkpoint_0000.pth.tar (after 4 steps)"):  # fmt: skip
        assert part in message, message


def test_negative_control_without_the_guard_the_weights_are_lost(ranks):
    """Nor is anything saved then: the state is looked at before it is written."""
    for rank in ranks[1]:
        own = rank["control"]
        assert own["code"] == 2 and not own["unchanged"] and own["step"] > BAD_STEP
        assert "weights or state are not finite (rank 0: " in own["message"]
        assert "checkpoint_0001.pth.tar" not in own["files"]


def test_a_signal_is_read_a_step_later_too_by_both(ranks):
    """Its flag is shared in step 6 and read in step 7; step 8 would end the epoch."""
    assert [rank["stopped"] for rank in ranks[1]] == [[128 + signal.SIGTERM, 7]] * 2


def test_the_replay_file_lists_every_ranks_images(ranks):
    base, found = ranks
    case = list(itertools.product(PLACES, RANKS, READINGS)).index(("keys", 1, "at once"))
    path = base / f"runs/{case}/nonfinite_step_{BAD_STEP}.pt"
    assert replay_lists_the_batch(path, base / "images")
    replay = torch.load(path, weights_only=True)
    assert replay["ranks"][0]["findings"] == [] and replay["ranks"][1]["findings"]
    whole = ckpt.read_torch_file(base / "runs/whole/checkpoint_0001.pth.tar")
    assert replay["config_digest"] == whole["extra"]["config_digest"]


def test_a_stopped_run_goes_on_from_its_last_good_checkpoint(ranks):
    base, found = ranks
    expected = tiny.state_digest(ckpt.read_torch_file(base / "runs/whole/checkpoint_0001.pth.tar"))
    for number in (0, 12):
        assert [rank[f"resumed {number}"] for rank in found] == [4, 4]
        content = ckpt.read_torch_file(base / f"runs/{number}/checkpoint_0001.pth.tar")
        assert tiny.state_digest(content) == expected
