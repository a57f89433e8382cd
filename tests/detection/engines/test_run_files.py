"""Checkpoints of a run, whatever the engine."""

from types import SimpleNamespace

import pytest

from detection.engines.run_files import newest_state, periodic_path, read_state, write_state
from moco.errors import CheckpointError
from moco.training.changes import Changes
from moco.training.checkpoint import save_checkpoint


@pytest.fixture
def run(tmp_path):
    return SimpleNamespace(
        output_dir=tmp_path, config_digest="abc", seed=7, identity=None, changes=Changes(),
        process=SimpleNamespace(is_main=True), progress=True,
    )  # fmt: skip


def write(run, iteration, engine="one"):
    path = periodic_path(run.output_dir, iteration)
    write_state(run, path, {"model": {}}, iteration=iteration, engine=engine)
    return path


def test_the_newest_two_are_kept_and_the_newest_whole_one_is_found(run):
    paths = [write(run, iteration) for iteration in (4, 9, 14)]
    assert [path.exists() for path in paths] == [False, True, True]
    assert newest_state(run.output_dir, 100) == (paths[2], [])
    assert (run.output_dir / "last_checkpoint").read_text() == "model_0000014.pth"
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    periodic_path(run.output_dir, 99).write_bytes(b"half")
    path, refused = newest_state(run.output_dir, 100)
    assert path == paths[1]
    assert "model_0000099.pth: has no manifest" in refused[0] and "bytes" in refused[1]


def test_content_comes_back_with_its_identity(run):
    content = read_state(run, write(run, 3), engine="one", keys=("model",))
    assert content == {
        "model": {}, "iteration": 3, "config_digest": "abc", "seed": 7, "engine": "one",
        "changes": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 8}, "has seed 7, this run has 8"),
        ({"config_digest": "x"}, "has config_digest abc, this run has x"),
    ],
)
def test_state_of_another_run_is_refused(run, changes, message):
    path = write(run, 3)
    other = SimpleNamespace(**{**vars(run), **changes})
    with pytest.raises(CheckpointError, match=message):
        read_state(other, path, engine="one", keys=("model",))


def test_state_of_another_engine_or_kind_is_refused(run):
    path = write(run, 3)
    with pytest.raises(CheckpointError, match="has engine one, this run has two"):
        read_state(run, path, engine="two", keys=("model",))
    with pytest.raises(CheckpointError, match="not a checkpoint of a training run of this engine"):
        read_state(run, path, engine="one", keys=("model", "trainer"))


def test_a_final_model_of_fewer_iterations_is_one_to_continue_from(run):
    """Where the state before precise batch norm is there it is taken, else the final model."""
    last = write(run, 9)
    final = run.output_dir / "model_final.pth"
    save_checkpoint(final, {"model": {}}, iteration=9)
    assert newest_state(run.output_dir, 10)[0] == final
    assert newest_state(run.output_dir, 20)[0] == last
    later = write(run, 14)
    assert newest_state(run.output_dir, 20)[0] == later
    for path in (last, later):
        path.unlink()
    assert newest_state(run.output_dir, 20)[0] == final
