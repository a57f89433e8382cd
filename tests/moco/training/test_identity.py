"""What must be the same when a run continues, key by key and number by number."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from moco import cfgnode
from moco.cfgnode import flatten
from moco.config import ADDED_LATER, DIGEST_EXCLUDE, load_pretrain_config
from moco.errors import CheckpointError, ConfigError
from moco.training import state
from moco.training.changes import Changes, pretraining_changes
from moco.training.identity import RunIdentity, code_digest

SOURCE = SimpleNamespace(paths=("a.png", "b.png"))
PATH = Path("checkpoint_0000.pth.tar")


class Images(SimpleNamespace):
    def __len__(self):
        return len(self.paths)


def identity(world_size=2, paths=("a.png", "b.png"), **changes):
    return RunIdentity.of(tiny.config(**changes), Images(paths=tuple(paths)), world_size)


def extra(of, **changes):
    return {"config": of.config, "data_digest": of.data_digest, "world_size": of.world_size,
            "config_digest": of.config_digest, "step": 4, **changes}  # fmt: skip


def test_the_same_run_has_nothing_to_say():
    assert identity().check(PATH, extra(identity())) == []
    assert identity().check(PATH, extra(identity()), elastic=True) == []


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TRAIN__BATCH_SIZE": 4}, r"another configuration \(TRAIN.BATCH_SIZE 8 -> 4\)"),
        ({"SEED": 1, "MODEL__DIM": 4}, r"\(MODEL.DIM 8 -> 4; SEED 0 -> 1\)"),
        ({"paths": ("a.png", "c.png")}, "another set of images"),
        ({"paths": ("b.png", "a.png")}, "another set of images"),
    ],
)
def test_configuration_and_images_may_never_differ(changes, message, elastic):
    with pytest.raises(CheckpointError, match=message) as error:
        identity(**changes).check(PATH, extra(identity()), elastic=elastic)
    assert "\n" not in str(error.value)


def test_an_allowed_name_permits_itself_and_no_other():
    before, now = identity(), identity(TRAIN__LR=0.1, SEED=1)
    with pytest.raises(CheckpointError, match=r"\(SEED 0 -> 1\)"):
        now.check(PATH, extra(before), allowed=["TRAIN.LR"])
    assert now.check(PATH, extra(before), allowed=["TRAIN.LR", "SEED"]) == []
    other = identity(paths=("a.png", "c.png"))
    with pytest.raises(CheckpointError, match="another set of images"):
        other.check(PATH, extra(before), allowed=["TRAIN.LR"])
    assert other.check(PATH, extra(before), allowed=["data"]) == []


def test_changes_of_all_starts_are_listed_and_unused_names_said():
    changes, said = Changes(["TRAIN.LR", "data"]), []
    earlier = [{"name": "SEED", "before": 0, "now": 1, "step": 2}]
    [line] = changes.add(4, earlier, identity(TRAIN__LR=0.1).differences(extra(identity())))
    assert line == "--allow-change: TRAIN.LR 0.03 -> 0.1 from step 4 on"
    new = {"name": "TRAIN.LR", "before": 0.03, "now": 0.1, "step": 4}
    assert changes.new == [new] and changes.all() == [*earlier, new]
    changes.say_unused(said.append)
    assert said == ["--allow-change: data did not change at this start"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("TRAIN.LRR", r"unknown name 'TRAIN.LRR' \(did you mean 'TRAIN.LR'\?\); allowed: "),
        ("TRAIN", "unknown name 'TRAIN'"),
        ("TRAIN.ACCUMULATION_STEPS", "give --elastic"),
        ("LOG.PERIOD", "may always differ"),
        ("DATA.NUM_WORKERS", "may always differ"),
    ],
)
def test_a_name_that_cannot_be_allowed_is_refused(name, message):
    with pytest.raises(ConfigError, match=f"--allow-change: .*{message}"):
        pretraining_changes([name])


def test_other_code_is_said():
    [line] = state._changed_code(PATH, {"code_digest": "0" * 16})
    assert f"(sha256 {'0' * 16}, now {code_digest()})" in line
    [line] = state._changed_code(PATH, {})
    assert "sha256 not recorded" in line
    assert state._changed_code(PATH, {"code_digest": code_digest()}) == []


def test_what_changes_no_number_may_differ():
    changes = {"DATA__NUM_WORKERS": 3, "LOG__PERIOD": 7, "KNN__K": 3, "CHECKPOINT__KEEP_LAST": 9}
    assert identity(**changes).check(PATH, extra(identity())) == []


def test_another_number_of_processes_names_both_and_the_flag():
    with pytest.raises(CheckpointError, match="with 2 processes, now there are 4; .*--elastic"):
        identity(4).check(PATH, extra(identity(2)))


def test_elastic_says_what_happens_to_the_groups_of_batch_norm():
    """8 images, 2 groups a process."""
    first, second = identity(4).check(PATH, extra(identity(2)), elastic=True)
    assert "with 2 processes, now there are 4" in first and "every pixel" in first
    assert "groups of 2 images before and sees groups of 1 now" in second
    assert "TRAIN.ACCUMULATION_STEPS" not in second  # more processes cannot make larger groups
    whole = {"MODEL__BN_SPLITS": 1, "MODEL__NORM": "SyncBN"}
    assert len(identity(4, **whole).check(PATH, extra(identity(2, **whole)), elastic=True)) == 1


def accumulating(world_size, steps):
    """As a configuration with that many parts a step would be."""
    of = identity(world_size)
    of.config["TRAIN"]["ACCUMULATION_STEPS"] = steps
    return of


def test_fewer_processes_are_told_which_accumulation_keeps_the_groups():
    lines = accumulating(1, 1).check(PATH, extra(accumulating(2, 1)), elastic=True)
    assert "groups of 2 images before and sees groups of 4 now" in lines[1]
    assert lines[1].endswith("TRAIN.ACCUMULATION_STEPS 2 keeps groups of 2")


def test_processes_times_accumulation_is_what_counts():
    lines = accumulating(1, 2).check(PATH, extra(accumulating(2, 1)), elastic=True)
    assert len(lines) == 1
    assert "2 processes, now there are 1, and TRAIN.ACCUMULATION_STEPS 1, now it is 2" in lines[0]


def test_another_accumulation_alone_needs_the_flag_too():
    with pytest.raises(CheckpointError, match="ACCUMULATION_STEPS 1, now it is 2; .*--elastic"):
        accumulating(2, 2).check(PATH, extra(accumulating(2, 1)))
    lines = accumulating(2, 2).check(PATH, extra(accumulating(2, 1)), elastic=True)
    assert "groups of 2 images before and sees groups of 1 now" in lines[1]


@pytest.mark.parametrize("broken", [None, [], {}, {"step": 1}, {"config": "x"}])
def test_an_extra_that_is_not_ours_is_one_line(broken):
    with pytest.raises(CheckpointError, match="its 'extra' lacks a valid config, data_digest"):
        state._check_extra(PATH, broken)
    whole = {**extra(identity()), "versions": state.versions()}
    state._check_extra(PATH, whole)
    with pytest.raises(CheckpointError, match="lacks a valid changes"):
        state._check_extra(PATH, {**whole, "changes": {}})


def test_other_versions_are_said():
    versions = {**state.versions(), "torch": "2.10.0"}
    [line] = state._changed_versions(PATH, {"versions": versions})
    assert "made with torch 2.10.0, now" in line
    assert state._changed_versions(PATH, {"versions": state.versions()}) == []


def test_control_the_compared_keys_are_all_but_the_excluded():
    assert {"TRAIN.LR", "MODEL.ARCH", "SEED"} <= flatten(identity().config).keys()


def test_keys_that_came_later_leave_older_runs_as_they_were():
    """Digests as of the code before these keys; a checkpoint without them continues."""
    digest = cfgnode.digest(load_pretrain_config(None), DIGEST_EXCLUDE, ADDED_LATER)
    assert digest == "d66bee2e7e7a546d" and identity().config_digest == "6f35b7ed833afdf9"
    older = extra(identity())
    older["config"] = cfgnode.to_dict(tiny.config())
    for key in ADDED_LATER:
        section, name = key.split(".")
        del older["config"][section][name]
    assert identity().check(PATH, older) == []
    other = identity(TRAIN__TF32=True)
    assert other.config_digest != identity().config_digest
    assert other.differences(older) == {"TRAIN.TF32": (False, True)}
    used = identity(DATA__SIXTEEN_BIT_RANGE="(0, 4095)")
    assert used.config_digest != identity().config_digest
    with pytest.raises(CheckpointError, match=r"SIXTEEN_BIT_RANGE \[0, 65535\] -> \[0, 4095\]"):
        used.check(PATH, older)
    now = identity(DATA__CHANNELS=1, DATA__MEAN="(0.5,)", DATA__STD="(0.5,)")
    assert now.config_digest != identity().config_digest
    with pytest.raises(CheckpointError, match=r"\(DATA.CHANNELS 3 -> 1; DATA.MEAN"):
        now.check(PATH, older)
