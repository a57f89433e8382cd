"""NaN in the loss, the gradient, the keys or the queue of one of two processes stops both at once.

Both ways of reading the findings: at once, as on a CPU, and one step later while the device leaves
out the update, as on a GPU (here with torch's fused SGD, which obeys `found_inf` on a CPU too).
"""

import contextlib
import io
import itertools
import signal

import pytest
import tiny
import torch
from processes import in_processes

from moco.data.images import find_images
from moco.distributed import ProcessInfo, tensors_digest
from moco.errors import exit_on_error
from moco.training import checkpoint as ckpt
from moco.training.batch import build_loader
from moco.training.trainer import Trainer

PLACES = ("loss", "gradient", "keys", "queue")
RANKS = (0, 1)
READINGS = ("at once", "a step later")
BAD_STEP = 5  # the second of the second epoch: one checkpoint is there
NAMES = {
    "loss": ("the loss is not finite", "loss=nan"),
    "gradient": ("the gradient is not finite", "gradient of encoder_q.layer1.0.conv1.weight"),
    "keys": ("keys are not finite", "1 of 4 keys"),
    "queue": ("the loss is not finite", "queue itself; loss=nan"),
}


def _trainer(rank, images, folder, reading="at once", resume=False):
    cfg = tiny.config(TRAIN__EPOCHS=2, LOG__PERIOD=1 if reading == "at once" else 5)
    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))
    trainer = Trainer(cfg, find_images(images), folder, process, resume=resume, say=lambda _: None)
    if reading == "a step later":
        options = dict(lr=cfg.TRAIN.LR, momentum=0.9, weight_decay=cfg.TRAIN.WEIGHT_DECAY)
        trainer.optimizer = torch.optim.SGD(trainer.method.parameters(), fused=True, **options)
        trainer.guard.delayed = True
    if reading == "blind":
        trainer.guard.check = lambda *args, **options: None
    return trainer


class Poison:
    """Puts NaN into one place of step BAD_STEP, and notes the state before it."""

    def __init__(self, trainer, place, active):
        self.trainer, self.method, self.place, self.active = trainer, trainer.method, place, active
        self.step, self.before, self.bad_images, self.images = -1, None, None, None
        self.prepare, self.contrast = self.method.prepare, self.method.contrast
        self.method.prepare, self.method.contrast = self._prepare, self._contrast
        self.method.encoder_q.layer1[0].conv1.weight.register_hook(self._gradient)

    def _now(self, place):
        """Also when the step is done again, to find out whose gradient it was."""
        bad = self.bad_images is not None and torch.equal(self.images, self.bad_images)
        return self.active and self.place == place and bad

    def _prepare(self, *args, **options):
        self.step += 1
        if self.step == BAD_STEP:
            if self.active and self.place == "queue":
                self.method.queue[0, 3] = float("nan")
            self.before = learned(self.trainer)
        return self.prepare(*args, **options)

    def _contrast(self, view_q, view_k, index, *others):
        self.images = index
        if self.step == BAD_STEP:
            self.bad_images = index
        output = self.contrast(view_q, view_k, index, *others)
        if self._now("loss"):
            output.loss = output.loss * float("nan")
        if self._now("keys"):
            output.keys_VBD = output.keys_VBD.clone()
            output.keys_VBD[0, 1, 2] = float("nan")
        return output

    def _gradient(self, gradient):
        return gradient * float("nan") if self._now("gradient") else gradient


class StopRank1:
    """SIGTERM to one of the processes, when the fifth step is logged."""

    def __init__(self, rank):
        self.rank = rank

    def on_step(self, record):
        if record.step == 5 and self.rank == 1:
            signal.raise_signal(signal.SIGTERM)

    def on_epoch(self, record):
        pass


def learned(trainer):
    """Digest of what an update changes: query encoder, queue, pointer, optimizer."""
    state = dict(trainer.method.encoder_q.named_parameters())
    state |= dict(trainer.method.named_buffers(recurse=False))
    for number, entry in trainer.optimizer.state_dict()["state"].items():
        state[f"optimizer.{number}"] = entry["momentum_buffer"]
    return tensors_digest(state)


def _poisoned(rank, images, folder, place, bad_rank, reading):
    trainer = _trainer(rank, images, folder, reading)
    poison = Poison(trainer, place, active=rank == bad_rank)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        exit_on_error(trainer.train)()
    keys = [p for p in trainer.method.encoder_k.parameters()]
    return {
        "code": ended.value.code,
        "message": said.getvalue(),
        "step": poison.step,
        "unchanged": learned(trainer) == poison.before,
        "key encoder is finite": all(bool(torch.isfinite(p).all()) for p in keys),
        "files": sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")),
    }


def _all(rank, images, folder):
    found = {}
    for number, case in enumerate(itertools.product(PLACES, RANKS, READINGS)):
        found["/".join(map(str, case))] = _poisoned(rank, images, folder / str(number), *case)
    found["control"] = _poisoned(rank, images, folder / "control", "gradient", 0, "blind")
    stopped = _trainer(rank, images, folder / "stopped", "a step later")
    found["stopped"] = [stopped.train([StopRank1(rank)]), stopped.last_step]
    # The runs of the first and last place go on from what is left of them.
    whole = _trainer(rank, images, folder / "whole")
    whole.train()
    for number in (0, 12):
        resumed = _trainer(rank, images, folder / str(number), resume=True)
        found[f"resumed {number}"] = resumed.first_step
        resumed.train()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    from PIL import Image

    base = tmp_path_factory.mktemp("nonfinite")
    (base / "images").mkdir()
    for i in range(32):
        image = Image.new("RGB", (20, 20), (8 * i, 255 - 6 * i, 100))
        image.paste((255 - 8 * i, 40, 7 * i), (i % 5, i % 7, i % 5 + 9, i % 7 + 6))
        image.save(base / "images" / f"{i:02d}.png")
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
    replay = torch.load(base / f"runs/{case}/nonfinite_step_{BAD_STEP}.pt", weights_only=True)
    assert (replay["step"], replay["epoch"], replay["world_size"]) == (BAD_STEP, 1, 2)
    assert [r["rank"] for r in replay["ranks"]] == [0, 1]
    assert replay["ranks"][0]["findings"] == [] and replay["ranks"][1]["findings"]
    whole = ckpt.read_torch_file(base / "runs/whole/checkpoint_0001.pth.tar")
    assert replay["config_digest"] == whole["extra"]["config_digest"]
    source = find_images(base / "images")
    for report in replay["ranks"]:  # as docs/TRAINING.md makes the batch again
        process = ProcessInfo(report["rank"], 2, 0, torch.device("cpu"))
        again = build_loader(
            tiny.config(), source, process, first_step=BAD_STEP, last_step=BAD_STEP + 1
        )
        assert next(iter(again))[2].tolist() == report["indices"]
        assert report["names"] == [f"{index:02d}.png" for index in report["indices"]]


def test_a_stopped_run_goes_on_from_its_last_good_checkpoint(ranks):
    base, found = ranks
    expected = tiny.state_digest(
        ckpt.read_torch_file(base / "runs/whole/checkpoint_0001.pth.tar")
    )
    for number in (0, 12):
        assert [rank[f"resumed {number}"] for rank in found] == [4, 4]
        content = ckpt.read_torch_file(base / f"runs/{number}/checkpoint_0001.pth.tar")
        assert tiny.state_digest(content) == expected
