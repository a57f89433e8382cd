"""The log on a full disk, and continued by a process that is killed."""

import json
import os
import resource

import pytest

from moco.errors import CheckpointError
from moco.training.progress import JsonLog, StepRecord


def record(step):
    return StepRecord(step, 9, 0, 1, loss=1.0, lr=0.1, images_per_s=1.0, eta_s=1.0)


def test_a_full_disk_is_one_line_that_names_the_log(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl", 0)
    log.on_step(record(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size, before[1]))
    try:
        with pytest.raises(CheckpointError, match="log.jsonl: cannot be written .File too large"):
            log.on_step(record(2))
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    [line] = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


def test_killed_while_dropping_the_steps_to_be_done_again_the_log_stays(tmp_path, monkeypatch):
    log = JsonLog(tmp_path / "log.jsonl", 0)
    for step in (1, 2, 3):
        log.on_step(record(step))
    log.close()
    before = (tmp_path / "log.jsonl").read_text()

    def die(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        JsonLog(tmp_path / "log.jsonl", 1)
    assert (tmp_path / "log.jsonl").read_text() == before
    monkeypatch.undo()
    JsonLog(tmp_path / "log.jsonl", 1).close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_changes_are_kept_but_one_that_may_be_made_again(tmp_path):
    def changes():
        lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        return [line["name"] for line in lines if line["kind"] == "change"]

    log = JsonLog(tmp_path / "log.jsonl", 0)
    for step in (1, 2, 3):
        log.on_step(record(step))
    log.close()
    for first_step, name in ((2, "A"), (2, "B"), (3, "C")):
        JsonLog(tmp_path / "log.jsonl", first_step, [{"name": name, "step": first_step}]).close()
    assert changes() == ["B", "C"]  # B started where A did, before a checkpoint had A in it
