"""R23: the data of detection runs changed between their starts."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
from quick_trials import (
    QuickEngine,
    draw_nothing,
    edit,
    halve_training_split,
    make_data,
    make_job,
    reverse_training_split,
)

from detection import trials
from detection.data.fingerprint import PartFingerprint
from detection.engines.base import TrainingStopped
from moco.errors import CheckpointError

pytestmark = pytest.mark.faults
DIFFICULT = ("<difficult>0", "<difficult>1")
# change -> (what is done to the folder, words of the refusal)
CHANGES = {
    "halved": (halve_training_split, "image 'train_00004': not there now"),
    "reordered": (reverse_training_split, "training data: .*in another order"),
    "box of a training image": (
        partial(edit, image_id="train_00003", pattern=r"<xmin>\d+", new="<xmin>3"),
        "image 'train_00003': boxes changed",
    ),
    "box of a test image": (
        partial(edit, image_id="test_00001", pattern=r"<ymin>\d+", new="<ymin>3"),
        "test data: .*image 'test_00001': boxes changed",
    ),
    "flag": (
        partial(edit, image_id="test_00002", pattern=DIFFICULT[0], new=DIFFICULT[1]),
        "image 'test_00002': flags changed",
    ),
    "object removed": (
        partial(edit, image_id="test_00000", pattern=r"(?s)<object>.*?</object>", new=""),
        "image 'test_00000': number of objects, boxes",
    ),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(autouse=True)
def without_drawing(monkeypatch):
    draw_nothing(monkeypatch)


def start(folder, template, *, finished: bool):
    """(data, output folder) of trials of which the first is finished, or stopped half way."""
    root, out, engine = folder / "data", folder / "out", QuickEngine()
    shutil.copytree(template, root)
    engine.stop_after = None if finished else 3
    try:
        trials.run_trials(make_job(root, out, engine), 1)
    except TrainingStopped:
        assert not finished
    return root, out


def files(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_refused(root, out, words: str) -> bool:
    """The same command on changed data ends with the words, and writes nothing."""
    before = files(out)
    try:
        trials.run_trials(make_job(root, out, QuickEngine()), 2)
    except CheckpointError as error:
        assert "\n" not in str(error)
        with pytest.raises(CheckpointError, match=words):
            raise
        return files(out) == before
    return False


def is_recorded(root, out, *, finished: bool) -> bool:
    """With --allow-change data it goes on, and no mean is over trials of different data."""
    results = trials.run_trials(make_job(root, out, QuickEngine(), allow_change=["data"]), 2)
    first, second = results["trials"]
    if not finished:
        manifest = out / "trial_0" / "model_final.pth.manifest.json"
        [change] = first["changes"]
        assert json.loads(manifest.read_text())["changes"] == [change]
        assert change["name"] == "data" and change["step"] == 3
    return (
        first["status"] == "left out"
        and second["data"] == results["data"] != (first["changes"] or [{}])[0].get("before")
        and results["mean"]["AP50"] == second["AP50"]
        and results["num_finished"] == 1
    )


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_changed_data_are_refused_by_name_or_recorded(template, tmp_path, observed, finished):
    good = 0
    for name, (change, words) in CHANGES.items():
        root, out = start(tmp_path / name, template, finished=finished)
        change(root)
        good += is_refused(root, out, words) and is_recorded(root, out, finished=finished)
    observed("R23", good, len(CHANGES))


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_moved_or_touched_data_are_the_same(template, tmp_path, observed, finished):
    root, out = start(tmp_path / "run", template, finished=finished)
    moved = root.rename(tmp_path / "moved")
    for path in moved.rglob("*.xml"):
        path.touch()
    results = trials.run_trials(make_job(moved, out, QuickEngine()), 2)
    same = results["num_finished"] == 2 and not any(t["changes"] for t in results["trials"])
    observed("R23", int(same), 1)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_control_without_the_fingerprint_changed_data_are_averaged(
    template, tmp_path, observed, monkeypatch, finished
):
    of = PartFingerprint.of.__func__
    monkeypatch.setattr(
        PartFingerprint,
        "of",
        classmethod(lambda cls, records, names, **how: of(cls, [], names, **how)),
    )
    failed = 0
    for name, (change, words) in CHANGES.items():
        root, out = start(tmp_path / name, template, finished=finished)
        change(root)
        failed += not is_refused(root, out, words)
        results = json.loads((out / "results.json").read_text())
        assert results["num_finished"] == 2
    observed("R23", failed, len(CHANGES), control=True)
