"""A finished run goes on with a larger SOLVER.MAX_ITER, bit for bit as if it had been longer."""

import json
import shutil

import pytest
from detectron2_runs import (
    BASE_LR,
    MAX_ITER,
    NUM_ITERATIONS,
    NUM_MORE,
    extend,
    make_run,
    make_shapes,
)
from training_runs import differing, final_state

from detection.engines.embedded.engine import EmbeddedEngine
from moco.errors import CheckpointError
from moco.training.checkpoint import read_torch_file, save_checkpoint

ENGINE = EmbeddedEngine()
STREAM = {"DATALOADER__STREAM": "detectron2", "SEED": 3}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes")


def short_and_long(shapes, folder, **keys):
    """A finished run, and one that was longer from its start."""
    short = make_run(shapes, folder / "short", engine=ENGINE.name, **keys)
    ENGINE.train(short)
    more = {"SOLVER__MAX_ITER": NUM_ITERATIONS + NUM_MORE, **keys}
    long = make_run(shapes, folder / "long", engine=ENGINE.name, **more)
    ENGINE.train(long)
    return short, long


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    return short_and_long(shapes, tmp_path_factory.mktemp("runs"))


def trained(run):
    """What training left: the records of changes differ."""
    content = final_state(run)
    return {name: content[name] for name in ("model", "optimizer", "iteration")}


def losses(run):
    lines = (run.output_dir / "metrics.json").read_text().splitlines()
    return [[json.loads(line)[k] for k in ("iteration", "total_loss", "lr")] for line in lines]


def test_it_equals_the_run_that_was_longer(runs, shapes, tmp_path):
    short, long = runs
    folder = shutil.copytree(short.output_dir, tmp_path / "run")
    run = extend(ENGINE, shapes, folder)
    assert differing(trained(run), trained(long)) == []
    assert losses(run) == losses(long) and len(losses(run)) == NUM_ITERATIONS + NUM_MORE
    [change] = final_state(run)["changes"]
    assert change == {"name": MAX_ITER, "before": 4, "now": 6, "step": 4}
    # Again: nothing is left to train.
    modified = (folder / "model_final.pth").stat().st_mtime_ns
    extend(ENGINE, shapes, folder, allow_change=())
    assert (folder / "model_final.pth").stat().st_mtime_ns == modified


def test_with_detectron2s_stream_too(shapes, tmp_path):
    short, long = short_and_long(shapes, tmp_path, **STREAM)
    run = extend(ENGINE, shapes, short.output_dir, **STREAM)
    assert differing(trained(run), trained(long)) == []


def test_negative_control_without_its_momentum_it_does_not(runs, shapes, tmp_path):
    short, long = runs
    folder = shutil.copytree(short.output_dir, tmp_path / "run")
    for path in folder.glob("model_000*.pth"):
        path.unlink()
    content = read_torch_file(folder / "model_final.pth")
    content["optimizer"]["state"] = {}
    manifest = json.loads((folder / "model_final.pth.manifest.json").read_text())
    save_checkpoint(folder / "model_final.pth", content, iteration=manifest["iteration"])
    assert differing(trained(extend(ENGINE, shapes, folder)), trained(long))


def test_from_the_final_model_alone(runs, shapes, tmp_path):
    """The counters of batch norm, which nothing reads, have counted precise batch norm too."""
    short, long = runs
    folder = shutil.copytree(short.output_dir, tmp_path / "run")
    for path in folder.glob("model_000*.pth*"):
        path.unlink()
    found = differing(trained(extend(ENGINE, shapes, folder)), trained(long))
    assert [name for name in found if not name.endswith("num_batches_tracked")] == []


def test_without_permission_it_is_refused_and_another_rate_counts(runs, shapes, tmp_path):
    short, _ = runs
    folder = shutil.copytree(short.output_dir, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"\(SOLVER.MAX_ITER 4 there, 6 now\)"):
        extend(ENGINE, shapes, folder, allow_change=())
    allowed = (MAX_ITER, BASE_LR)
    run = extend(ENGINE, shapes, folder, allow_change=allowed, SOLVER__BASE_LR=0.02)
    # 0.01 before; STEPS (3,) divides by 10. A checkpoint holds the old rate.
    assert [rate for _, _, rate in losses(run)][3:] == pytest.approx([0.001, 0.002, 0.002])
