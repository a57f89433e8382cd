"""The Detectron2 engine: it is Detectron2's trainer, held to this project's guarantees."""

import json
import multiprocessing
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.modeling import ROI_HEADS_REGISTRY  # noqa: E402
from detectron2_runs import (  # noqa: E402
    BASE_LR,
    MAX_ITER,
    NUM_ITERATIONS,
    NUM_MORE,
    ONE_ITERATION,
    config,
    extend,
    make_run,
    make_shapes,
)
from training_runs import crash, send_sigterm, stop_at  # noqa: E402

from detection.engines import d2_session  # noqa: E402
from detection.engines.base import TrainingStopped  # noqa: E402
from detection.engines.d2 import Detectron2Engine  # noqa: E402
from detection.engines.embedded.engine import EmbeddedEngine  # noqa: E402
from detection.engines.embedded.faster_rcnn import build_model  # noqa: E402
from moco.errors import CheckpointError, ConfigError, DataError, NonFiniteError  # noqa: E402
from moco.training.checkpoint import read_torch_file  # noqa: E402

pytestmark = pytest.mark.detectron2

@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """An uninterrupted run."""
    run = make_run(shapes, tmp_path_factory.mktemp("finished"))
    Detectron2Engine().train(run)
    return run


def model_in(run, name="model_final.pth"):
    return read_torch_file(run.output_dir / name)["model"]


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def metrics(run):
    lines = (run.output_dir / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_run_leaves_detectron2s_files_with_manifests_and_our_metrics(finished, capfd):
    folder = finished.output_dir
    names = {path.name for path in folder.glob("*.pth")}
    assert names == {"model_0000002.pth", "model_0000003.pth", "model_final.pth"}
    assert all((folder / f"{name}.manifest.json").is_file() for name in names)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    content = read_torch_file(folder / "model_final.pth")
    assert {"model", "trainer", "iteration"} <= content.keys()
    assert content["trainer"]["iteration"] == content["iteration"] == NUM_ITERATIONS - 1
    assert content["engine"] == "detectron2" and content["seed"] == 3
    assert "roi_heads.res5.norm.running_mean" in content["model"]
    records = metrics(finished)
    assert [r["iteration"] for r in records] == list(range(NUM_ITERATIONS))
    assert [r["lr"] for r in records] == pytest.approx([1e-5, 0.005005, 0.01, 0.001])
    fields = {"total_loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "time"}
    assert fields <= records[0].keys()
    assert "detectron2" in (folder / d2_session.LOG_FILE).read_text()


def test_detectron2s_checkpointer_reads_the_final_model(finished):
    from detection.engines.d2 import _build_model, _detectron2_cfg

    model = _build_model(_detectron2_cfg(finished.cfg))
    DetectionCheckpointer(model).load(str(finished.output_dir / "model_final.pth"))
    assert differing(model.state_dict(), model_in(finished)) == []


def test_it_trains_bit_for_bit_as_the_embedded_engine_replaying_its_stream(
    shapes, finished, tmp_path
):
    """That engine equals Detectron2's own trainer (tests/parity/test_trainer_vs_detectron2.py)."""
    run = make_run(shapes, tmp_path, DATALOADER__STREAM="detectron2", SEED=3)
    EmbeddedEngine().train(run)
    assert differing(model_in(run), model_in(finished)) == []
    records = finished.data.test_records
    theirs, ours = (e.predict(r, records) for e, r in ((Detectron2Engine(), finished),
                                                       (EmbeddedEngine(), run)))  # fmt: skip
    for image_id, found in theirs.items():
        assert len(found[0]) and all(map(np.array_equal, found, ours[image_id]))


def test_a_resnet18_trains_bit_for_bit_as_the_embedded_engine(shapes, tmp_path):
    """With basic blocks in res5 too, where Detectron2's own heads build bottlenecks."""
    keys = {
        "MODEL__RESNETS__DEPTH": 18,
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
        "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
        "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 8,
        "TEST__PRECISE_BN__NUM_ITER": 1,
        **ONE_ITERATION,
    }
    theirs = make_run(shapes, tmp_path / "theirs", **keys)
    Detectron2Engine().train(theirs)
    ours = make_run(shapes, tmp_path / "ours", DATALOADER__STREAM="detectron2", SEED=3, **keys)
    EmbeddedEngine().train(ours)
    assert differing(model_in(ours), model_in(theirs)) == []
    assert model_in(theirs)["roi_heads.res5.1.conv2.weight"].shape == (512, 512, 3, 3)
    narrow = config(shapes, **{**keys, "MODEL__RESNETS__STEM_OUT_CHANNELS": 32,
                               "MODEL__RESNETS__RES2_OUT_CHANNELS": 32})  # fmt: skip
    with pytest.raises(ConfigError, match="is 32, but Detectron2 builds DEPTH 18 with 64 only"):
        Detectron2Engine().check(narrow, eval_only=False)


def test_another_seed_is_another_model(shapes, finished, tmp_path):
    """Negative control of the comparisons of models."""
    run = make_run(shapes, tmp_path, seed=4)
    Detectron2Engine().train(run)
    assert differing(model_in(run), model_in(finished))


def test_precise_bn_changes_only_the_statistics(finished):
    changed = differing(model_in(finished, "model_0000003.pth"), model_in(finished))
    assert any("running_mean" in name for name in changed)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert all(name.endswith(buffers) for name in changed)


def test_catalogs_are_left_as_they_were(finished):
    assert not [name for name in DatasetCatalog if "training data of" in name]
    assert not [name for name in MetadataCatalog if "training data of" in name]


@pytest.mark.parametrize("iteration, workers", [(1, 2), (NUM_ITERATIONS - 1, 0)])
def test_sigterm_saves_and_the_run_goes_on(
    shapes, finished, tmp_path, monkeypatch, capsys, iteration, workers
):
    with monkeypatch.context() as patch:
        stop_at(patch, iteration, send_sigterm)
        with pytest.raises(TrainingStopped, match=f"after iteration {iteration + 1} .*--resume"):
            run = make_run(shapes, tmp_path, DATALOADER__NUM_WORKERS=workers)
            Detectron2Engine().train(run)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not multiprocessing.active_children()
    stopped = read_torch_file(tmp_path / f"model_{iteration:07d}.pth")
    assert not (tmp_path / "model_final.pth").exists()
    run = make_run(shapes, tmp_path, resume=True)
    Detectron2Engine().train(run)
    printed = capsys.readouterr().out
    assert f"at iteration {iteration + 1}; Detectron2 draws images and random" in printed
    # The schedule goes on, and no iteration is done twice.
    assert [(r["iteration"], r["lr"]) for r in metrics(run)] == [
        (r["iteration"], r["lr"]) for r in metrics(finished)
    ]
    if iteration == NUM_ITERATIONS - 1:  # only precise batch norm was left
        changed = differing(stopped["model"], model_in(run))
        assert changed and all(".running_" in n or "batches_tracked" in n for n in changed)


def test_resumed_session_begins_with_the_saved_model_and_momentum(shapes, finished, tmp_path):
    shutil.copytree(finished.output_dir, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("model_final.pth*"):
        path.unlink()
    run = make_run(shapes, tmp_path, resume=True)
    seen = {}

    def note(run, trainer):
        seen.update(trainer.checkpointer.model.state_dict())
        seen["momentum"] = trainer.optimizer.state_dict()["state"][0]["momentum_buffer"]
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d2_session, "train", note)
        with pytest.raises(KeyboardInterrupt):
            Detectron2Engine().train(run)
    saved = read_torch_file(tmp_path / "model_0000003.pth")
    momentum = saved["trainer"]["_trainer"]["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(seen.pop("momentum"), momentum)
    assert differing(seen, saved["model"]) == []


def test_killed_between_checkpoints_and_resumed_past_damaged_ones(
    shapes, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, crash)
        with pytest.raises(KeyboardInterrupt):
            Detectron2Engine().train(make_run(shapes, tmp_path))
    newest = tmp_path / "model_0000002.pth"
    newest.write_bytes(newest.read_bytes()[:-10])
    # Detectron2's own resume would read this one.
    (tmp_path / "model_0000003.pth").write_bytes(b"half")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    Detectron2Engine().train(make_run(shapes, tmp_path, resume=True))
    printed = capsys.readouterr().out
    assert printed.count("refused: ") == 2
    assert "model_0000003.pth: has no manifest" in printed
    assert "model_0000001.pth at iteration 2" in printed
    assert (tmp_path / "model_final.pth").is_file()


def test_a_finished_run_is_extended(shapes, tmp_path):
    """It goes on with the optimizer's state, at the rates of the configuration."""
    engine = Detectron2Engine()
    short = make_run(shapes, tmp_path, engine=engine.name)
    engine.train(short)
    rates = [g["lr"] for g in final_trainer(short)["_trainer"]["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.001] * len(rates))
    with pytest.raises(CheckpointError, match=r"\(SOLVER.MAX_ITER 4 there, 6 now\)"):
        extend(engine, shapes, tmp_path, allow_change=())
    allowed = (MAX_ITER, BASE_LR)
    extend(engine, shapes, tmp_path, allow_change=allowed, SOLVER__BASE_LR=0.02)
    records = metrics(short)
    assert [r["iteration"] for r in records] == list(range(NUM_ITERATIONS + NUM_MORE))
    assert [r["lr"] for r in records][3:] == pytest.approx([0.001, 0.002, 0.002])
    content = read_torch_file(tmp_path / "model_final.pth")
    assert [c["name"] for c in content["changes"]] == [MAX_ITER, BASE_LR]
    assert content["iteration"] == NUM_ITERATIONS + NUM_MORE - 1
    assert content["class_names"] == ["circle", "square", "triangle", "cross"]
    from detection.engines.d2 import _build_model, _detectron2_cfg

    model = _build_model(_detectron2_cfg(short.cfg))
    DetectionCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    assert differing(model.state_dict(), content["model"]) == []
    # The same again: nothing is left to train.
    extend(engine, shapes, tmp_path, allow_change=(), SOLVER__BASE_LR=0.02)
    assert len(metrics(short)) == NUM_ITERATIONS + NUM_MORE


def final_trainer(run):
    return read_torch_file(run.output_dir / "model_final.pth")["trainer"]


@pytest.mark.parametrize("reset", [False, True])
def test_a_detector_of_other_classes_is_a_start_as_for_the_embedded_engine(
    shapes, finished, tmp_path, reset
):
    """Its class-dependent tensors stay as initialised; where asked so do those of equal shape."""
    keys = {"MODEL__WEIGHTS": finished.output_dir / "model_final.pth"}
    if reset:
        keys |= {"MODEL__RESET_PREDICTORS": True}
    else:
        keys |= {"DATASETS__VOC_CLASSES": ("a", "b"), "MODEL__ROI_HEADS__NUM_CLASSES": 2}
    cfg = config(shapes, **keys)
    line = Detectron2Engine().check(cfg, eval_only=False)
    shape = (5, 256) if reset else (3, 256)
    assert f"cls_score.weight (5, 256) -> {shape}" in line
    assert "4 class-dependent tensors initialised anew" in line
    assert EmbeddedEngine().check(cfg, eval_only=False) == line
    from detection.engines.d2 import _build_model, _detectron2_cfg, _load_weights

    torch.manual_seed(0)
    model = _build_model(_detectron2_cfg(cfg))
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _load_weights(model, cfg, eval_only=False)
    kept = [n for n, t in model.state_dict().items() if torch.equal(t, first[n])]
    predictors = [name for name in first if "box_predictor" in name]
    assert len(predictors) == 4 and set(predictors) <= set(kept)
    assert not any(name.endswith(("conv1.weight", "rpn_head.conv.weight")) for name in kept)
    if not reset:
        with pytest.raises(CheckpointError, match="fine-tuned for 4 classes"):
            Detectron2Engine().check(cfg, eval_only=True)


def test_finished_run_is_not_repeated(shapes, finished):
    before = (finished.output_dir / "model_final.pth").stat().st_mtime_ns
    Detectron2Engine().train(make_run(shapes, finished.output_dir, resume=True))
    assert (finished.output_dir / "model_final.pth").stat().st_mtime_ns == before


def test_state_of_the_embedded_engine_is_refused(shapes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 0, send_sigterm)
        with pytest.raises(TrainingStopped):
            EmbeddedEngine().train(make_run(shapes, tmp_path))
    with pytest.raises(CheckpointError, match="not a checkpoint of a training run of this engine"):
        Detectron2Engine().train(make_run(shapes, tmp_path, resume=True))


def test_non_finite_loss_names_iteration_and_images(shapes, tmp_path):
    run = make_run(shapes, tmp_path, SOLVER__BASE_LR=1e18, SOLVER__WARMUP_ITERS=0)
    with pytest.raises(NonFiniteError, match=r"iteration [1-3]: the loss is not finite") as caught:
        Detectron2Engine().train(run)
    ids = [record["image_id"] for record in run.data.train_records]
    assert sum(image_id in str(caught.value) for image_id in ids) == 2
    assert "\n" not in str(caught.value) and not (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_cannot_be_read_is_one_line(shapes, tmp_path, workers):
    run = make_run(shapes, tmp_path / "run", DATALOADER__NUM_WORKERS=workers)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    for record in run.data.train_records:
        record["file_name"] = str(broken)
    with pytest.raises(DataError, match=r"^[^\n]*broken.jpg: Detectron2 cannot use[^\n]*$"):
        Detectron2Engine().train(run)


# Weights


def backbone_file(path, cfg, change=lambda tensors: None):
    """A converted backbone: what MoCo's converter leaves of this model."""
    torch.manual_seed(1)
    tensors = {}
    for name, tensor in build_model(cfg).state_dict().items():
        prefix = "backbone." if name.startswith("backbone.") else "roi_heads."
        short = name.removeprefix(prefix)
        if short.startswith(("stem.", "res")) and not short.startswith("res5.norm"):
            if not short.endswith("num_batches_tracked"):
                tensors[short] = tensor + 0.125
    change(tensors)
    content = {"model": tensors, "__author__": "test", "matching_heuristics": True}
    if path.suffix == ".pkl":
        content["model"] = {name: tensor.numpy() for name, tensor in tensors.items()}
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return tensors


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_backbone_is_loaded_by_its_checkpointer_without_running_code(
    shapes, tmp_path, monkeypatch, suffix
):
    path = tmp_path / f"moco{suffix}"
    tensors = backbone_file(path, config(shapes))
    assert len(tensors) == 265
    run = make_run(shapes, tmp_path / "run", MODEL__WEIGHTS=path)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    line = Detectron2Engine().check(run.cfg, eval_only=False)
    assert "265 tensors loaded" in line
    seen = {}
    monkeypatch.setattr(
        d2_session, "train", lambda _, t: seen.update(t.checkpointer.model.state_dict())
    )
    Detectron2Engine().train(run)
    for name, tensor in tensors.items():
        whole = f"roi_heads.{name}" if name.startswith("res5.") else f"backbone.{name}"
        assert torch.equal(seen[whole], tensor)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("res4.3.conv2.weight"), r"lacks 1 .*res4.3.conv2.weight"),
        (lambda t: t.update(res9=torch.zeros(1)), "res9"),
        (lambda t: t.update({"stem.conv1.weight": torch.zeros(9, 3, 7, 7)}), "has shape"),
        (lambda t: t["res2.0.conv1.weight"].fill_(float("nan")), "NaN"),
    ],
)
def test_wrong_weights_are_refused_before_training(shapes, tmp_path, change, message):
    path = tmp_path / "wrong.pth"
    backbone_file(path, config(shapes), change)
    with pytest.raises(CheckpointError, match=message):
        Detectron2Engine().check(config(shapes, MODEL__WEIGHTS=path), eval_only=False)


def test_a_tensor_that_its_checkpointer_passes_over_is_an_error(shapes, tmp_path, monkeypatch):
    path = tmp_path / "moco.pth"
    backbone_file(path, config(shapes))
    load = DetectionCheckpointer._load_model

    def forgetful(self, checkpoint):
        checkpoint["model"] = {n: t for n, t in checkpoint["model"].items() if "res3.1" not in n}
        return load(self, checkpoint)

    monkeypatch.setattr(DetectionCheckpointer, "_load_model", forgetful)
    with pytest.raises(CheckpointError, match="Detectron2 loads 15 tensors otherwise .*res3.1"):
        Detectron2Engine().check(config(shapes, MODEL__WEIGHTS=path), eval_only=False)


def test_eval_only_needs_a_fine_tuned_model(shapes, tmp_path):
    path = tmp_path / "moco.pth"
    backbone_file(path, config(shapes))
    with pytest.raises(CheckpointError, match="--eval-only needs a fine-tuned model"):
        Detectron2Engine().check(config(shapes, MODEL__WEIGHTS=path), eval_only=True)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is ''"):
        Detectron2Engine().check(config(shapes), eval_only=True)


def test_either_engine_runs_the_others_model_with_the_same_detections(shapes, finished, tmp_path):
    records = finished.data.test_records
    weights = finished.output_dir / "model_final.pth"
    evaluated = make_run(shapes, tmp_path / "a", eval_only=True, MODEL__WEIGHTS=weights)
    of_theirs = [e.predict(evaluated, records) for e in (EmbeddedEngine(), Detectron2Engine())]
    embedded = make_run(shapes, tmp_path / "b")
    EmbeddedEngine().train(embedded)
    weights = embedded.output_dir / "model_final.pth"
    evaluated = make_run(shapes, tmp_path / "c", eval_only=True, MODEL__WEIGHTS=weights)
    of_ours = [e.predict(evaluated, records) for e in (EmbeddedEngine(), Detectron2Engine())]
    for first, second in (of_theirs, of_ours):
        for image_id, found in first.items():
            assert len(found[0]) and all(map(np.array_equal, found, second[image_id]))
    assert not np.array_equal(of_theirs[0]["test_00000"][0], of_ours[0]["test_00000"][0])


def test_detector_detects_as_predict(finished):
    records = finished.data.test_records
    detect = Detectron2Engine().detector(finished)
    for image_id, found in Detectron2Engine().predict(finished, records).items():
        (record,) = (r for r in records if r["image_id"] == image_id)
        without = {key: value for key, value in record.items() if key != "annotations"}
        assert all(map(np.array_equal, found, detect(without)))


# Settings


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"MODEL__CHANNELS_LAST": True}, "MODEL.CHANNELS_LAST is True.*--engine embedded"),
        ({"TEST__AMP__ENABLED": True}, "TEST.AMP.ENABLED"),
        ({"INPUT__SIXTEEN_BIT_RANGE": (0, 4095)}, "INPUT.SIXTEEN_BIT_RANGE.*--engine embedded"),
        ({"SOLVER__AMP__ENABLED": True}, "SOLVER.AMP.ENABLED.*GPU only"),
        ({"SOLVER__STEPS": (NUM_ITERATIONS,)}, "SOLVER: Detectron2 cannot build"),
    ],
)
def test_what_it_does_not_implement_is_an_error(shapes, monkeypatch, keys, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        Detectron2Engine().check(config(shapes, **keys), eval_only=False)


def test_extra_norm_heads_are_registered(finished):
    assert "Res5ROIHeadsExtraNorm" in ROI_HEADS_REGISTRY


def test_versions_name_what_changes_numbers():
    versions = Detectron2Engine().versions()
    assert {"torch", "torchvision", "detectron2", "pillow"} <= versions.keys()
    assert all(versions.values())
