"""The embedded engine's loop: exact resume, what it refuses, what it writes."""

import json
import signal
import sys

import numpy as np
import pytest
import torch
from training_runs import (
    KERNELS,
    crash,
    differing,
    final_state,
    in_two_ranks,
    send_sigterm,
    stop_at,
)

from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.shapes import make_shapes_dataset
from detection.engines.base import Run, TrainingStopped
from detection.engines.embedded import engine as engine_module
from detection.engines.embedded.engine import EmbeddedEngine, amp_note
from detection.engines.embedded.rpn import RPN
from detection.engines.progress import MAX_LINES_OFF_TERMINAL, Progress
from detection.engines.session import StopFlag, check_losses, loss_problem, own_part
from moco import distributed
from moco.distributed import ProcessInfo
from moco.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceMemoryError,
    NonFiniteError,
)
from moco.kernels import compiler
from moco.training.checkpoint import read_torch_file, save_checkpoint, verify_manifest

PROCESS = ProcessInfo(0, 1, 0, torch.device("cpu"))
NUM_ITERATIONS = 4
TINY = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.NUM_CLASSES": 4,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TRAIN": (64, 72),
    "INPUT.MIN_SIZE_TEST": 72,
    "DATASETS.VOC_CLASSES": ("circle", "square", "triangle", "cross"),
    "DATASETS.TRAIN": ("train",),
    "DATASETS.TEST": ("test",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": NUM_ITERATIONS,
    "SOLVER.STEPS": (3,),
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.PROGRESS_PERIOD": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 1,
}
ONE_ITERATION = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": ()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_dataset(root, num_train=6, num_test=3, num_unlabelled=0, size=80, seed=0)


def make_run(root, output_dir, *, process=PROCESS, seed=3, resume=False, eval_only=False, **keys):
    keys = {**TINY, "DATASETS.VOC_ROOT": root, **{k.replace("__", "."): v for k, v in keys.items()}}
    cfg = load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
    output_dir.mkdir(parents=True, exist_ok=True)
    return Run(
        cfg=cfg,
        data=check_and_load(cfg),
        output_dir=output_dir,
        seed=seed,
        process=process,
        config_digest="digest",
        resume=resume,
        eval_only=eval_only,
        progress=False,
    )


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """An uninterrupted run."""
    run = make_run(shapes, tmp_path_factory.mktemp("finished"))
    EmbeddedEngine().train(run)
    return run


def records(run):
    """metrics.json without the times."""
    lines = (run.output_dir / "metrics.json").read_text().splitlines()
    timed = ("time", "data_time", "eta_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def test_run_leaves_final_model_the_newest_two_and_metrics(finished):
    names = {path.name for path in finished.output_dir.glob("*.pth")}
    assert names == {"model_0000002.pth", "model_0000003.pth", "model_final.pth"}
    assert (finished.output_dir / "last_checkpoint").read_text() == "model_final.pth"
    content = final_state(finished)
    assert content["iteration"] == NUM_ITERATIONS - 1 and content["seed"] == 3
    assert [r["iteration"] for r in records(finished)] == list(range(NUM_ITERATIONS))
    assert records(finished)[0]["lr"] < records(finished)[2]["lr"] == 0.01


def test_precise_bn_changes_only_the_statistics(finished):
    last = read_torch_file(finished.output_dir / "model_0000003.pth")
    changed = differing(last["model"], final_state(finished)["model"])
    assert any("running_mean" in name for name in changed)
    # The counters move with every forward pass in train mode, in Detectron2 too.
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert all(name.endswith(buffers) for name in changed)


@pytest.mark.parametrize("iteration", [0, 2, NUM_ITERATIONS - 1])
def test_stopped_and_resumed_equals_uninterrupted(
    shapes, finished, tmp_path, monkeypatch, iteration
):
    with monkeypatch.context() as patch:
        stop_at(patch, iteration, send_sigterm)
        with pytest.raises(TrainingStopped, match=f"after iteration {iteration + 1} .*--resume"):
            EmbeddedEngine().train(make_run(shapes, tmp_path))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run = make_run(shapes, tmp_path, resume=True)
    EmbeddedEngine().train(run)
    assert differing(final_state(run), final_state(finished)) == []
    assert records(run) == records(finished)


def test_killed_between_checkpoints_and_resumed_past_a_damaged_one(
    shapes, finished, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, crash)
        with pytest.raises(KeyboardInterrupt):
            EmbeddedEngine().train(make_run(shapes, tmp_path))
    newest = tmp_path / "model_0000002.pth"
    newest.write_bytes(newest.read_bytes()[:-10])
    run = make_run(shapes, tmp_path, resume=True)
    object.__setattr__(run, "progress", True)
    EmbeddedEngine().train(run)
    printed = capsys.readouterr().out
    assert "refused" in printed and "model_0000001.pth at iteration 2" in printed
    assert differing(final_state(run), final_state(finished)) == []


def test_comparison_notices_a_lost_momentum(shapes, finished, tmp_path, monkeypatch):
    """Negative control of the resume tests."""
    with monkeypatch.context() as patch:
        stop_at(patch, 1, send_sigterm)
        with pytest.raises(TrainingStopped):
            EmbeddedEngine().train(make_run(shapes, tmp_path))
    path = tmp_path / "model_0000001.pth"
    content = read_torch_file(path)
    content["optimizer"]["state"] = {}
    save_checkpoint(path, content)
    run = make_run(shapes, tmp_path, resume=True)
    EmbeddedEngine().train(run)
    assert differing(final_state(run), final_state(finished))


def test_another_seed_is_another_run(shapes, finished, tmp_path):
    run = make_run(shapes, tmp_path, seed=4)
    EmbeddedEngine().train(run)
    assert differing(final_state(run)["model"], final_state(finished)["model"])


def test_finished_run_is_not_repeated(shapes, finished):
    before = (finished.output_dir / "model_final.pth").stat().st_mtime_ns
    EmbeddedEngine().train(make_run(shapes, finished.output_dir, resume=True))
    assert (finished.output_dir / "model_final.pth").stat().st_mtime_ns == before


def test_checkpoint_of_another_seed_is_refused(shapes, tmp_path):
    save_checkpoint(
        tmp_path / "model_0000001.pth",
        {"model": {}, "optimizer": {}, "iteration": 1, "config_digest": "digest", "seed": 9},
    )
    with pytest.raises(CheckpointError, match="has seed 9, this run has 3"):
        EmbeddedEngine().train(make_run(shapes, tmp_path, resume=True))


def test_non_finite_loss_stops_before_the_update(shapes, tmp_path, monkeypatch):
    calls = []

    def broken(model, batch):
        calls.append(batch)
        losses = forward(model, batch)
        if len(calls) < 3:
            return losses
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self: pytest.fail("updated"))
        return {name: loss * float("nan") for name, loss in losses.items()}

    forward = engine_module.GeneralizedRCNN.forward
    monkeypatch.setattr(engine_module.GeneralizedRCNN, "forward", broken)
    with pytest.raises(NonFiniteError) as caught:
        EmbeddedEngine().train(make_run(shapes, tmp_path))
    text = str(caught.value)
    assert text.startswith("iteration 2: ") and "loss_cls=nan" in text
    assert all(sample["image_id"] in text for sample in calls[2])
    assert "\n" not in text and "SOLVER.BASE_LR" in text


def test_non_finite_losses_are_seen():
    def found(loss, num_wild=0):
        losses = {"loss_a": torch.tensor(loss), "loss_b": torch.tensor(1.0)}
        stop = StopFlag([15] if loss == 2.0 else [])
        bad, stopping = check_losses(losses, torch.tensor(num_wild), stop, PROCESS)
        return bad, stopping, loss_problem(losses)

    assert found(2.0) == (False, True, None)
    assert found(3.0) == (False, False, None)
    assert found(3.0, num_wild=1) == (True, False, None)
    assert found(float("inf")) == (True, False, "loss_a=inf, loss_b=1")


def test_proposals_that_are_not_finite_stop_training_too(shapes, tmp_path, monkeypatch):
    def wild(self, *args):
        proposals = propose(self, *args)
        self.num_wild = self.num_wild + 7
        return proposals

    propose = RPN.propose
    monkeypatch.setattr(RPN, "propose", wild)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: pytest.fail("updated"))
    with pytest.raises(NonFiniteError, match=r"iteration 0: .* RPN: 7 of \d+ proposals of this"):
        EmbeddedEngine().train(make_run(shapes, tmp_path))


def test_diverging_run_ends_with_the_error(shapes, tmp_path):
    with pytest.raises(NonFiniteError, match=r"iteration \d: the loss is not finite"):
        EmbeddedEngine().train(make_run(shapes, tmp_path, SOLVER__BASE_LR=1e18))


def test_predictions_and_eval_only_agree(shapes, finished, tmp_path):
    test_records = finished.data.test_records
    detections = EmbeddedEngine().predict(finished, test_records)
    assert detections.keys() == {record["image_id"] for record in test_records}
    boxes, scores, classes = detections[test_records[0]["image_id"]]
    assert boxes.shape == (len(scores), 4) and boxes.dtype == np.float32
    assert len(scores) == len(classes) > 0 and set(classes) <= set(range(4))
    weights = finished.output_dir / "model_final.pth"
    run = make_run(shapes, tmp_path, eval_only=True, MODEL__WEIGHTS=weights)
    again = EmbeddedEngine().predict(run, test_records)
    for image_id, found in detections.items():
        assert all(np.array_equal(a, b) for a, b in zip(found, again[image_id], strict=True))
    other = make_run(shapes, tmp_path, eval_only=True, MODEL__WEIGHTS=weights, INPUT__FORMAT="RGB")
    changed = EmbeddedEngine().predict(other, test_records)[test_records[0]["image_id"]]
    assert not np.array_equal(changed[1], scores)


def test_check_refuses_unfit_weights(shapes, finished, tmp_path):
    model = final_state(finished)["model"]
    heads = ("proposal_generator.rpn_head.", "roi_heads.box_predictor.", "roi_heads.res5.norm.")
    backbone = {k: v for k, v in model.items() if not k.startswith(heads)}
    path = tmp_path / "backbone.pth"
    torch.save({"model": backbone}, path)
    cfg = make_run(shapes, tmp_path, MODEL__WEIGHTS=path).cfg
    assert f"{len(backbone)} tensors loaded" in EmbeddedEngine().check(cfg, eval_only=False)
    with pytest.raises(CheckpointError, match="--eval-only needs a fine-tuned model"):
        EmbeddedEngine().check(cfg, eval_only=True)
    torch.save({"model": {k: v for k, v in backbone.items() if ".res3.1." not in k}}, path)
    with pytest.raises(CheckpointError, match="res3.1"):
        EmbeddedEngine().check(cfg, eval_only=False)
    with pytest.raises(ConfigError, match="--eval-only needs"):
        EmbeddedEngine().check(make_run(shapes, tmp_path).cfg, eval_only=True)


def test_amp_trains_and_differs_from_full_precision(shapes, finished, tmp_path):
    run = make_run(shapes, tmp_path, SOLVER__AMP__ENABLED=True, **ONE_ITERATION)
    assert amp_note(finished.cfg, PROCESS.device) is None
    EmbeddedEngine().train(run)
    assert records(run)[0]["total_loss"] != records(finished)[0]["total_loss"]
    assert records(run)[0]["total_loss"] == pytest.approx(
        records(finished)[0]["total_loss"], rel=0.1
    )


def test_fast_settings_train_and_predict_close_to_full_precision(shapes, finished, tmp_path):
    fast = {
        "MODEL__CHANNELS_LAST": True,
        "SOLVER__AMP__ENABLED": True,
        "TEST__AMP__ENABLED": True,
    }
    run = make_run(shapes, tmp_path, **fast, **ONE_ITERATION)
    EmbeddedEngine().train(run)
    assert records(run)[0]["total_loss"] == pytest.approx(
        records(finished)[0]["total_loss"], rel=0.1
    )
    best = []
    weights = finished.output_dir / "model_final.pth"
    for changes in ({}, fast):
        run = make_run(shapes, tmp_path, eval_only=True, MODEL__WEIGHTS=weights, **changes)
        detections = EmbeddedEngine().predict(run, run.data.test_records)
        best.append(np.array([found[1].max() for found in detections.values()]))
    assert not np.array_equal(*best)
    np.testing.assert_allclose(*best, rtol=0.1)


def test_detections_do_not_depend_on_loader_processes(shapes, finished, tmp_path):
    weights = finished.output_dir / "model_final.pth"
    test_records = finished.data.test_records
    found = []
    for num_workers in (0, 2):
        keys = {"MODEL__WEIGHTS": weights, "DATALOADER__NUM_WORKERS": num_workers}
        run = make_run(shapes, tmp_path, eval_only=True, **keys)
        found.append(EmbeddedEngine().predict(run, test_records))
    detect = EmbeddedEngine().detector(run)
    found.append({record["image_id"]: detect(record) for record in test_records})
    for image_id, entry in found[0].items():
        for other in found[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(entry, other[image_id], strict=True))
    gone = [{**test_records[0], "file_name": "gone.jpg"}]
    with pytest.raises(DataError, match="gone.jpg"):
        EmbeddedEngine().predict(run, gone)


def test_by_kernels_a_run_is_resumed_exactly(shapes, tmp_path, monkeypatch, capsys):
    finished = make_run(shapes, tmp_path / "whole", **KERNELS)
    object.__setattr__(finished, "progress", True)
    EmbeddedEngine().train(finished)
    assert "kernels: 107 layers (for this CPU, compiled" in capsys.readouterr().out
    run = make_run(shapes, tmp_path / "cut", **KERNELS)
    with monkeypatch.context() as patch:
        stop_at(patch, 1, send_sigterm)
        with pytest.raises(TrainingStopped):
            EmbeddedEngine().train(run)
    EmbeddedEngine().train(make_run(shapes, tmp_path / "cut", resume=True, **KERNELS))
    assert differing(final_state(run), final_state(finished)) == []
    eager = make_run(shapes, tmp_path / "eager", **{**KERNELS, "MODEL__COMPILE": "eager"})
    EmbeddedEngine().train(eager)
    assert differing(final_state(eager)["model"], final_state(finished)["model"])
    first, theirs = (records(r)[0]["total_loss"] for r in (finished, eager))
    assert first == pytest.approx(theirs, rel=1e-2)


def test_without_a_compiler_nothing_is_trained(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "_compiled", compiler._compiled.__wrapped__)
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = make_run(shapes, tmp_path, **KERNELS)
    with pytest.raises(ConfigError, match="'no-such-compiler' cannot be run.*or set .*COMPILE"):
        EmbeddedEngine().check(run.cfg, eval_only=False)


def test_few_lines_off_a_terminal(tmp_path, capsys):
    progress = Progress(tmp_path, start=0, end=90, period=2, show=True, stream=sys.stdout)
    for iteration in range(90):
        progress.report(iteration, {"loss_a": torch.tensor(1.0)}, 0.1)
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) <= MAX_LINES_OFF_TERMINAL and "iteration 90/90" in lines[-1]
    assert len((tmp_path / "metrics.json").read_text().splitlines()) == 45


@pytest.mark.parametrize("total, world", [(7, 3), (2, 4), (0, 2), (6, 2)])
def test_parts_of_the_ranks_cover_all_images_once(total, world):
    device = torch.device("cpu")
    parts = [own_part(total, ProcessInfo(r, world, r, device)) for r in range(world)]
    assert [i for part in parts for i in range(total)[part]] == list(range(total))


def _two_processes(root, output_dir, keys):
    torch.set_num_threads(1)
    process = distributed.setup_process("cpu")
    run = make_run(root, output_dir, process=process, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), **keys)
    EmbeddedEngine().train(run)
    detections = EmbeddedEngine().predict(run, run.data.test_records)
    assert detections.keys() == {record["image_id"] for record in run.data.test_records}
    # Every rank leaves with the model that rank 0 wrote.
    state = final_state(run)["model"]
    distributed.check_equal_across_ranks(state, "final model", process.device)
    torch.distributed.destroy_process_group()


def losses_of_two_processes(root, output_dir, keys):
    in_two_ranks(_two_processes, root, output_dir, keys)
    lines = (output_dir / "metrics.json").read_text().splitlines()
    return [r["total_loss"] for r in map(json.loads, lines) if "total_loss" in r]


def test_two_processes(shapes, finished, tmp_path):
    losses = losses_of_two_processes(shapes, tmp_path, {"TEST__EVAL_PERIOD": 1})
    # Samplers differ by rank, the images do not.
    assert losses[0] == pytest.approx(records(finished)[0]["total_loss"], rel=0.1)
    (evaluation,) = json.loads((tmp_path / "evaluations.json").read_text())
    best = verify_manifest(tmp_path / "model_best.pth")
    assert evaluation["iteration"] == best["iteration"] + 1 == 1
    assert evaluation["AP"] == best["AP"]


def test_two_processes_by_kernels(shapes, tmp_path):
    """There the norms, which exchange messages, are torch's."""
    eager = {**KERNELS, "MODEL__COMPILE": "eager"}
    expected, found = (
        losses_of_two_processes(shapes, tmp_path / keys["MODEL__COMPILE"], keys)
        for keys in (eager, KERNELS)
    )
    assert found == pytest.approx(expected, rel=1e-3) and found != expected


def test_out_of_memory_is_one_line_with_what_to_lower(shapes, finished, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine_module.GeneralizedRCNN, "forward", fail)
    monkeypatch.setattr(engine_module.GeneralizedRCNN, "inference", fail)
    wanted = r"detector training \(rank 0\): CUDA out of memory. .* Lower SOLVER.IMS_PER_BATCH"
    with pytest.raises(DeviceMemoryError, match=wanted):
        EmbeddedEngine().train(make_run(shapes, tmp_path))
    run = finished
    with pytest.raises(DeviceMemoryError, match=r"jpg \(rank 0\): CUDA .* INPUT.MAX_SIZE_TEST"):
        EmbeddedEngine().predict(run, run.data.test_records[:1])
