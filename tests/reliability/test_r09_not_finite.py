"""R9: NaN or Inf in the loss, a gradient, a key or the queue of one of two ranks."""

from __future__ import annotations

import itertools

import pytest
from poison import BAD_STEP, PLACES, RANKS, make_images, poisoned, replay_lists_the_batch
from processes import in_processes

pytestmark = pytest.mark.faults
VALUES = {"NaN": float("nan"), "Inf": float("inf")}
FINDING = {"loss": "the loss is", "gradient": "the gradient is", "keys": "keys are",
           "queue": "the loss is"}  # fmt: skip


def cases(long: bool) -> list[tuple[str, str, int, str]]:
    """(place, value, rank, reading). Short: every place with every value, the ranks in turn."""
    if long:
        readings = ("at once", "a step later")
        return list(itertools.product(PLACES, VALUES, RANKS, readings))
    pairs = enumerate(itertools.product(PLACES, VALUES))
    return [(place, value, (n + n // 2) % 2, "at once") for n, (place, value) in pairs]


def _work(rank, images, folder, listed) -> list[dict]:
    return [
        poisoned(rank, images, folder / str(n), place, bad_rank, reading, VALUES[value])
        for n, (place, value, bad_rank, reading) in enumerate(listed)
    ]


def holds(case, ranks: list[dict], folder, images) -> bool:
    """Nobody updates, all stop at one step with one line, ids and replay file are written."""
    place, _, bad_rank, reading = case
    message = ranks[0]["message"]
    files = ["checkpoint_0000.pth.tar", "checkpoint_0000.pth.tar.manifest.json",
             f"nonfinite_step_{BAD_STEP}.pt"]  # fmt: skip
    started = BAD_STEP + (reading == "a step later")
    same = all(
        (own["code"], own["step"], own["files"]) == (2, started, files)
        and own["unchanged"]
        and own["key encoder is finite"]
        and own["message"] == message
        for own in ranks
    )
    expected = f"error: step {BAD_STEP}: {FINDING[place]} not finite (rank {bad_rank}: "
    parts = (f"Images of rank {bad_rank}: ", ".png), ", f"nonfinite_step_{BAD_STEP}.pt",
             "checkpoint_0000.pth.tar (after 4 steps)")  # fmt: skip
    said = message.startswith(expected) and message.count("\n") == 1
    said = said and all(part in message for part in parts)
    return same and said and replay_lists_the_batch(folder / files[-1], images)


def good_cases(listed, folder) -> list[bool]:
    images = make_images(folder / "images")
    ranks = in_processes(_work, folder, images, folder / "runs", listed)
    return [
        holds(case, [rank[n] for rank in ranks], folder / "runs" / str(n), images)
        for n, case in enumerate(listed)
    ]


def test_no_rank_updates_and_both_stop_at_the_same_step(tmp_path, observed, long):
    listed = cases(long)
    found = good_cases(listed, tmp_path)
    assert all(found), [case for case, good in zip(listed, found, strict=True) if not good]
    observed("R9", sum(found), len(listed))


def test_control_without_the_guard_the_weights_are_spoiled(tmp_path, observed):
    listed = [(place, value, rank, "blind") for place, value, rank, _ in cases(False)]
    found = good_cases(listed, tmp_path)
    observed("R9", found.count(False), len(listed), control=True)
