"""Runs that replay Detectron2's random draws: exact resume, several ranks, what is refused.

That such a run equals Detectron2's is shown in tests/parity/test_trainer_vs_detectron2.py.
"""

from __future__ import annotations

import pytest
import torch
from training_runs import differing, final_state, in_two_ranks, send_sigterm, stop_at

from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.shapes import DEFAULT_CLASSES, make_shapes_dataset
from detection.engines.base import Run, TrainingStopped
from detection.engines.embedded.engine import EmbeddedEngine
from detection.engines.embedded.randomness import Detectron2Randomness, build_randomness
from detection.run_folder import run_digest
from moco import distributed
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError
from moco.training.checkpoint import remove_checkpoint

ALONE = ProcessInfo(0, 1, 0, torch.device("cpu"))
NUM_ITERATIONS = 3
TINY = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.NUM_CLASSES": 4,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "INPUT.MIN_SIZE_TRAIN": (53, 61),
    "DATASETS.VOC_CLASSES": DEFAULT_CLASSES,
    "DATASETS.TRAIN": ("train",),
    "DATASETS.TEST": ("test",),
    "DATALOADER.STREAM": "detectron2",
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": NUM_ITERATIONS,
    "SOLVER.STEPS": (),
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.PROGRESS_PERIOD": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 1,
    "SEED": 3,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_dataset(root, num_train=5, num_test=1, num_unlabelled=0, size=70, seed=0)


def make_run(root, output_dir, num_workers=0, *, process=ALONE, resume=False, **changes):
    keys = {**TINY, "DATASETS.VOC_ROOT": root, "DATALOADER.NUM_WORKERS": num_workers}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    cfg = load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
    output_dir.mkdir(parents=True, exist_ok=True)
    return Run(
        cfg=cfg,
        data=check_and_load(cfg),
        output_dir=output_dir,
        seed=cfg.SEED,
        process=process,
        config_digest="digest",
        resume=resume,
        progress=False,
    )


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """finished(num_workers): an uninterrupted run, done once."""
    runs = {}

    def run(num_workers: int) -> Run:
        if num_workers not in runs:
            runs[num_workers] = make_run(shapes, tmp_path_factory.mktemp("run"), num_workers)
            EmbeddedEngine().train(runs[num_workers])
        return runs[num_workers]

    return run


@pytest.mark.parametrize(("num_workers", "iteration"), [(0, 0), (0, NUM_ITERATIONS - 1), (2, 1)])
def test_stopped_and_resumed_equals_uninterrupted(
    shapes, finished, tmp_path, monkeypatch, num_workers, iteration
):
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_at(patch, iteration, send_sigterm)
        EmbeddedEngine().train(make_run(shapes, tmp_path, num_workers))
    torch.manual_seed(0)  # another session's generators are somewhere else
    run = make_run(shapes, tmp_path, num_workers, resume=True)
    EmbeddedEngine().train(run)
    assert differing(final_state(run), final_state(finished(num_workers))) == []


def test_comparison_notices_lost_random_states(shapes, finished, tmp_path, monkeypatch):
    """Negative control: the replayed stream alone does not make a resumed run equal."""
    reference = final_state(finished(0))
    run = make_run(shapes, tmp_path)
    EmbeddedEngine().train(run)
    assert differing(final_state(run), reference) == []
    for name in ("model_final.pth", f"model_{NUM_ITERATIONS - 1:07d}.pth"):
        remove_checkpoint(tmp_path / name)
    monkeypatch.setattr(Detectron2Randomness, "restore", lambda *_: None)
    EmbeddedEngine().train(make_run(shapes, tmp_path, resume=True))
    assert any(name.startswith(".model") for name in differing(final_state(run), reference))


def test_number_of_workers_and_stream_change_the_run(shapes, finished, tmp_path):
    """Here, as in Detectron2, the number of workers changes the stream."""
    model = final_state(finished(0))["model"]
    assert differing(final_state(finished(2))["model"], model)
    stateless = make_run(shapes, tmp_path, DATALOADER__STREAM="stateless")
    EmbeddedEngine().train(stateless)
    assert differing(final_state(stateless)["model"], model)
    assert "random_states" not in final_state(stateless)


def test_digest_knows_the_number_of_workers_where_it_matters(shapes, tmp_path):
    def digests(engine="embedded", **changes):
        runs = [make_run(shapes, tmp_path, num_workers, **changes) for num_workers in (0, 2)]
        return {run_digest(run.cfg, None, engine) for run in runs}

    assert len(digests()) == 2
    assert len(digests(DATALOADER__STREAM="stateless")) == 1
    assert len(digests("detectron2", DATALOADER__STREAM="stateless")) == 2


def test_states_of_other_ranks_or_devices_are_refused(shapes, tmp_path):
    randomness = build_randomness(make_run(shapes, tmp_path))
    states = randomness.states()
    with pytest.raises(CheckpointError, match=r"file.pth: holds the random generators of \[\]"):
        randomness.restore(None, "file.pth")
    with pytest.raises(CheckpointError, match=r"of \['cpu', 'cpu'\], this run needs \['cpu'\]"):
        randomness.restore(states * 2, "file.pth")
    with pytest.raises(CheckpointError, match="the same kind of device"):
        randomness.restore([{**states[0], "cuda": states[0]["cpu"]}], "file.pth")
    randomness.restore(states, "file.pth")


def _one_of_two_processes(root, output_dir):
    torch.set_num_threads(1)
    process = distributed.setup_process("cpu")
    run = make_run(root, output_dir, 2, process=process)
    EmbeddedEngine().train(run)
    whole = final_state(run)
    first, second = (state["cpu"] for state in whole["random_states"])
    assert not torch.equal(first, second)  # ranks have seeds of their own
    assert torch.equal((first, second)[process.rank], torch.get_rng_state())
    distributed.barrier()
    if process.is_main:
        for iteration in (1, 2):
            remove_checkpoint(output_dir / f"model_{iteration:07d}.pth")
        remove_checkpoint(output_dir / "model_final.pth")
    distributed.barrier()
    EmbeddedEngine().train(make_run(root, output_dir, 2, process=process, resume=True))
    assert differing(final_state(run), whole) == []
    torch.distributed.destroy_process_group()


def test_two_processes_and_their_resume(shapes, tmp_path):
    in_two_ranks(_one_of_two_processes, shapes, tmp_path)
