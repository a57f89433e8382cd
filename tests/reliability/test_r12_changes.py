"""R12: learning rate, architecture, data or code changed between two starts of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from faults import Stop
from pretrain_runs import arguments, final_digest, make_images, pretrain

from moco.errors import CheckpointError
from moco.training import checkpoint as ckpt
from moco.training import identity, state

pytestmark = pytest.mark.faults
LAST_STOP = "checkpoint_step_5.pth.tar"
# What the refusal must name -> the changed keys.
KEYS = {
    "TRAIN.LR 0.03 -> 0.1": {"TRAIN__LR": 0.1},
    "TRAIN.SCHEDULE 'cosine' -> 'step'": {"TRAIN__SCHEDULE": "step"},
    "TRAIN.WEIGHT_DECAY 0.0001 -> 0.01": {"TRAIN__WEIGHT_DECAY": 0.01},
    "TRAIN.BATCH_SIZE 8 -> 4": {"TRAIN__BATCH_SIZE": 4},
    "TRAIN.EPOCHS 3 -> 4": {"TRAIN__EPOCHS": 4},
    "MODEL.ARCH 'resnet18' -> 'resnet34'": {"MODEL__ARCH": "resnet34"},
    "MODEL.WIDTH 0.125 -> 0.25": {"MODEL__WIDTH": 0.25},
    "MODEL.BN_SPLITS 2 -> 1": {"MODEL__BN_SPLITS": 1},
    "MODEL.DIM 8 -> 4": {"MODEL__DIM": 4},
    "MOCO.TEMPERATURE 0.2 -> 0.07": {"MOCO__TEMPERATURE": 0.07},
    "DATA.SIZE 16 -> 24": {"DATA__SIZE": 24},
    "SEED 0 -> 1": {"SEED": 1},
}
IMAGES = {
    "one more": lambda folder: shutil.copy(folder / "00.png", folder / "new.png"),
    "one less": lambda folder: (folder / "31.png").unlink(),
    "renamed": lambda folder: (folder / "05.png").rename(folder / "zz.png"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """images/, and run/, stopped after 5 of 12 steps."""
    folder = tmp_path_factory.mktemp("changes")
    (folder / "images").mkdir()
    make_images(folder / "images")
    run = tiny.trainer(folder / "images", folder / "run", [])
    assert run.train([tiny.StopAfter(4)]) == 143
    assert (folder / "run" / LAST_STOP).exists()
    return folder


def is_refused(base: Path, folder: Path, change: str) -> bool:
    """Whether the change is refused by its name, in one line, and the run folder left alone."""
    shutil.copytree(base, folder)
    if change in IMAGES:
        IMAGES[change](folder / "images")
    wanted = "another set of images" if change in IMAGES else f"({change})"
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    try:
        tiny.trainer(folder / "images", folder / "run", [], **KEYS.get(change, {}))
    except CheckpointError as error:
        text = str(error)
        after = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
        place = str(folder / "run" / LAST_STOP)
        named = text.startswith(place) and wanted in text and "--allow-change" in text
        return named and "\n" not in text and before == after
    return False


def test_a_changed_key_or_list_of_images_is_refused_by_name(base, tmp_path, observed):
    changes = [*KEYS, *IMAGES]
    found = [change for n, change in enumerate(changes)
             if is_refused(base, tmp_path / str(n), change)]  # fmt: skip
    assert found == changes
    observed("R12", len(found), len(changes))


def test_control_without_the_comparison_changes_are_taken(base, tmp_path, monkeypatch, observed):
    monkeypatch.setattr(identity.RunIdentity, "check", lambda *args, **options: [])
    changes = [*KEYS, *IMAGES]
    found = [is_refused(base, tmp_path / str(n), change) for n, change in enumerate(changes)]
    observed("R12", found.count(False), len(changes), control=True)


def change_code(monkeypatch, folder: Path) -> str:
    """The package's sources elsewhere, with one comment more in the loss. Returns their digest."""
    package = Path(identity.__file__).parents[1]
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__"))
    identity.code_digest.cache_clear()
    monkeypatch.setattr(identity, "__file__", str(folder / "training/identity.py"))
    unchanged = identity.code_digest()
    with open(folder / "contrast/info_nce.py", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    identity.code_digest.cache_clear()
    assert identity.code_digest() != unchanged
    return unchanged


@pytest.fixture
def fresh_digest():
    yield
    identity.code_digest.cache_clear()


def warns_of_code(base: Path, folder: Path, before: str, now: str) -> bool:
    """Whether changed code is warned of with both hashes and the manifests name what wrote them."""
    said: list[str] = []
    run = tiny.trainer(base / "images", folder, said)
    assert run.first_step == 5 and run.train() == 0
    warned = [line for line in said if line.startswith("warning: ") and "other code" in line]
    stop = ckpt.verify_manifest(base / "run" / LAST_STOP)
    last = ckpt.verify_manifest(folder / "checkpoint_0002.pth.tar")
    assert (stop["code_digest"], last["code_digest"]) == (before, now)
    return len(warned) == 1 and f"(sha256 {before}, now {now})" in warned[0]


def test_changed_code_is_warned_of_and_its_hash_is_in_the_manifest(
    base, tmp_path, monkeypatch, fresh_digest, observed
):
    same: list[str] = []
    tiny.trainer(base / "images", shutil.copytree(base / "run", tmp_path / "same"), same)
    assert not any("other code" in line for line in same)
    before = change_code(monkeypatch, tmp_path / "moco")
    folder = shutil.copytree(base / "run", tmp_path / "run")
    observed("R12", int(warns_of_code(base, folder, before, identity.code_digest())), 1)


def test_control_code_that_is_not_compared_is_not_warned_of(
    base, tmp_path, monkeypatch, fresh_digest, observed
):
    before = change_code(monkeypatch, tmp_path / "moco")
    monkeypatch.setattr(state, "_changed_code", lambda path, extra: [])
    folder = shutil.copytree(base / "run", tmp_path / "run")
    warned = warns_of_code(base, folder, before, identity.code_digest())
    observed("R12", int(not warned), 1, control=True)


def test_an_allowed_change_is_made_and_recorded_in_log_and_manifest(base, tmp_path, observed):
    """The command: refused, allowed, then the same command for ever; two changes in a row."""
    images, folder, log = base / "images", tmp_path / "run", tmp_path / "log"
    assert pretrain(arguments(images, folder), log, 1, Stop("SIGTERM", 5)) == [143]
    changed = arguments(images, folder, "--resume", TRAIN__LR=0.5)
    assert pretrain(changed, log) == [2]
    assert "TRAIN.LR 0.03 -> 0.5" in Path(f"{log}.0").read_text().splitlines()[-1]
    allowed = arguments(images, folder, "--resume", "--allow-change", "TRAIN.LR", TRAIN__LR=0.5)
    assert pretrain(allowed, log, 1, Stop("SIGTERM", 8)) == [143]
    both = arguments(images, folder, "--resume", "--allow-change", "TRAIN.LR", "--allow-change",
                     "TRAIN.WEIGHT_DECAY", TRAIN__LR=0.5, TRAIN__WEIGHT_DECAY=0.1)  # fmt: skip
    assert pretrain(both, log) == [0]
    assert pretrain(both, log) == [0]  # and nothing is left to do
    said = Path(f"{log}.0").read_text()
    for line in (
        "--allow-change: TRAIN.LR 0.03 -> 0.5 from step 6 on",
        "--allow-change: TRAIN.LR did not change at this start",
        "--allow-change: TRAIN.WEIGHT_DECAY 0.0001 -> 0.1 from step 9 on",
        "this run is finished; nothing is left to do",
    ):
        assert line in said
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    own = [{k: r[k] for k in ("name", "before", "now", "step")}
           for r in records if r["kind"] == "change"]  # fmt: skip
    assert own == [
        {"name": "TRAIN.LR", "before": 0.03, "now": 0.5, "step": 6},
        {"name": "TRAIN.WEIGHT_DECAY", "before": 0.0001, "now": 0.1, "step": 9},
    ]
    rates = {r["step"]: r["lr"] for r in records if r["kind"] == "step"}
    assert list(rates) == list(range(1, 13)) and rates[7] / rates[6] == pytest.approx(0.5 / 0.03)
    last = folder / "checkpoint_0002.pth.tar"
    assert ckpt.verify_manifest(last)["changes"] == own
    content = ckpt.read_torch_file(last)
    assert content["extra"]["changes"] == own
    assert content["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    observed("R12", 1, 1)


def test_allowed_data_is_recorded_and_decay_does_change_the_weights(base, tmp_path, observed):
    ends = {}
    for name, options in {
        "unchanged": {},
        "decay": {"TRAIN__WEIGHT_DECAY": 0.1, "allow_change": ["TRAIN.WEIGHT_DECAY"]},
        "renamed": {"allow_change": ["data"]},
    }.items():
        shutil.copytree(base, tmp_path / name)
        if name in IMAGES:
            IMAGES[name](tmp_path / name / "images")
        folder = tmp_path / name / "run"
        run = tiny.trainer(tmp_path / name / "images", folder, [], **options)
        assert run.train() == 0
        ends[name] = final_digest(folder)
        made = [change["name"] for change in run.changes.new]
        assert made == list(options.get("allow_change", []))
    assert len(set(ends.values())) == 3
    observed("R12", 1, 1)
