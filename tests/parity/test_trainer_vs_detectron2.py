"""A whole run against Detectron2's own trainer, bitwise, on a CPU in fp32: its seeding, loader with
worker processes, warm-up, learning-rate step, precise batch norm, final checkpoint, metrics.json,
clipped gradients, and evaluations during training.
"""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_runs import differing, send_sigterm, stop_at

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import register_pascal_voc  # noqa: E402
from detectron2.engine import DefaultTrainer, HookBase, default_setup, hooks  # noqa: E402
from detectron2.evaluation import pascal_voc_evaluation  # noqa: E402
from detectron2.utils.events import JSONWriter  # noqa: E402
from parity import detectron2_side  # noqa: E402, F401  (registers the norm after res5)

from detection.config import load_detection_config  # noqa: E402
from detection.data.datasets import check_and_load  # noqa: E402
from detection.data.shapes import DEFAULT_CLASSES, make_shapes_dataset  # noqa: E402
from detection.engines.base import Run, TrainingStopped  # noqa: E402
from detection.engines.embedded import randomness  # noqa: E402
from detection.engines.embedded.engine import EmbeddedEngine  # noqa: E402
from detection.engines.embedded.faster_rcnn import build_model  # noqa: E402
from detection.engines.evaluations import finish_evaluations  # noqa: E402
from detection.scoring import score_detections  # noqa: E402
from moco.distributed import ProcessInfo  # noqa: E402
from moco.training.checkpoint import read_torch_file  # noqa: E402

pytestmark = pytest.mark.detectron2

NUM_ITERATIONS = 12
SEED = 11
LOSSES = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "total_loss", "lr")
SCORES = ("bbox/AP", "bbox/AP50", "bbox/AP75")
# Twice in six iterations; the thresholds let a model that knows nothing detect something.
EVALUATED = {
    "TEST.EVAL_PERIOD": 2,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "INPUT.MIN_SIZE_TEST": 69,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": (5,),
}
CLIPPED = {
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.02,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": (3,),
}
SHARED = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.NUM_CLASSES": len(DEFAULT_CLASSES),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "INPUT.MIN_SIZE_TRAIN": (61, 69, 75),
    "INPUT.MAX_SIZE_TRAIN": 90,
    "DATASETS.TRAIN": ("train",),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": NUM_ITERATIONS,
    "SOLVER.STEPS": (9,),
    "SOLVER.WARMUP_ITERS": 4,
    "SOLVER.BASE_LR": 0.01,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 3,
    "SEED": SEED,
}
OURS = {
    "DATALOADER.STREAM": "detectron2",
    "DATASETS.TEST": ("test",),
    "DATASETS.VOC_CLASSES": DEFAULT_CLASSES,
    "LOG.TENSORBOARD": False,
    "SOLVER.PROGRESS_PERIOD": 1,
    "SOLVER.CHECKPOINT_PERIOD": 100,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes_dataset(root, num_train=9, num_test=2, num_unlabelled=0, size=80, seed=4)
    for split in ("train", "test"):
        register_pascal_voc(split, str(root), split, 2007, DEFAULT_CLASSES)
    yield root
    for split in ("train", "test"):
        DatasetCatalog.remove(split)
        MetadataCatalog.remove(split)


class NoteRandomStates(HookBase):
    """At the end of training, before the last evaluation."""

    def after_train(self):
        self.torch = torch.get_rng_state()
        self.numpy = np.random.get_state(legacy=True)


class StableEvaluator(pascal_voc_evaluation.PascalVOCDetectionEvaluator):
    """Tied scores in one order on every CPU (docs/COMPATIBILITY.md)."""

    def evaluate(self):
        stable = SimpleNamespace(**{k: getattr(np, k) for k in dir(np) if not k.startswith("__")})
        stable.argsort = lambda values: np.argsort(values, kind="stable")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pascal_voc_evaluation, "np", stable)
            return super().evaluate()


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return StableEvaluator(dataset_name)

    def build_hooks(self):
        writers = [JSONWriter(f"{self.cfg.OUTPUT_DIR}/metrics.json")]
        self.noted = NoteRandomStates()
        *own, _ = super().build_hooks()
        return [self.noted, *own, hooks.PeriodicWriter(writers, period=1)]


def read_metrics(path) -> list[dict]:
    """The compared figures of metrics.json, by iteration."""
    by_iteration = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        kept = {name: record[name] for name in (*LOSSES, *SCORES) if name in record}
        by_iteration.setdefault(record["iteration"], {}).update(kept)
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def run_detectron2(output_dir, num_workers, weights, changes) -> dict:
    """What is left of a run of the official trainer."""
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in {**SHARED, **changes}.items() for item in pair])
    cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.WEIGHTS = num_workers, str(weights)
    cfg.OUTPUT_DIR = str(output_dir)
    if cfg.TEST.EVAL_PERIOD:
        cfg.DATASETS.TEST = ("test",)
    default_setup(cfg, None)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(output_dir / "model_final.pth", weights_only=True)
    optimizer = trainer.optimizer.state_dict()
    return {
        "model": saved["model"],
        "momentum": optimizer["state"],
        "params": [group["params"] for group in optimizer["param_groups"]],
        "metrics": read_metrics(output_dir / "metrics.json"),
        "torch": trainer.noted.torch,
        "numpy": trainer.noted.numpy,
    }


def make_run(root, output_dir, num_workers, *, resume=False, **changes) -> Run:
    keys = {**SHARED, **OURS, "DATALOADER.NUM_WORKERS": num_workers, "DATASETS.VOC_ROOT": root}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    cfg = load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
    output_dir.mkdir(parents=True, exist_ok=True)
    return Run(
        cfg=cfg,
        data=check_and_load(cfg),
        output_dir=output_dir,
        seed=cfg.SEED,
        process=ProcessInfo(0, 1, 0, torch.device("cpu")),
        config_digest="digest",
        resume=resume,
        progress=False,
    )


def run_embedded(run: Run, monkeypatch) -> dict:
    """As `run_detectron2`."""
    streams = []

    class Noted(randomness.Detectron2Stream):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            streams.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(randomness, "Detectron2Stream", Noted)
        EmbeddedEngine().train(run)
    states = torch.get_rng_state(), streams and streams[0].main_numpy.get_state(legacy=True)
    saved = read_torch_file(run.output_dir / "model_final.pth")
    if run.cfg.TEST.EVAL_PERIOD:
        detections = EmbeddedEngine().predict(run, run.data.test_records)
        finish_evaluations(run, score_detections(run.data, run.cfg, detections, None))
    return {
        "model": saved["model"],
        "momentum": saved["optimizer"]["state"],
        "params": [group["params"] for group in saved["optimizer"]["param_groups"]],
        "metrics": read_metrics(run.output_dir / "metrics.json"),
        "torch": states[0],
        "numpy": states[1],
    }


@pytest.fixture(scope="module")
def official(shapes, tmp_path_factory):
    """official(num_workers): the run of Detectron2, done once."""
    done = {}

    def run(num_workers: int, weights="", **changes) -> dict:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        key = (num_workers, weights, tuple(changes.items()))
        if key not in done:
            output_dir = tmp_path_factory.mktemp("detectron2")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done[key] = run_detectron2(output_dir, num_workers, weights, changes)
        return done[key]

    return run


@pytest.fixture
def backbone_file(tmp_path):
    """Pretrained weights in a converter's form: backbone and res5, no heads."""
    cfg = load_detection_config(None, [item for pair in SHARED.items() for item in pair])
    torch.manual_seed(99)
    renamed = {}
    for name, tensor in build_model(cfg).state_dict().items():
        short = name.removeprefix("backbone.").removeprefix("roi_heads.")
        if short.startswith(("stem.", "res")) and "res5.norm" not in short:
            renamed[short] = tensor
    path = tmp_path / "backbone.pth"
    torch.save({"model": renamed, "__author__": "test", "matching_heuristics": True}, path)
    return path


def assert_equal(ours: dict, theirs: dict) -> None:
    assert len(ours["metrics"]) >= 4 and all("total_loss" in of for of in ours["metrics"][:4])
    assert len(ours["model"]) == 333 and len(ours["momentum"]) == 171
    assert differing(ours, theirs) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_whole_run_is_equal(shapes, official, tmp_path, monkeypatch, num_workers):
    ours = run_embedded(make_run(shapes, tmp_path, num_workers), monkeypatch)
    assert_equal(ours, official(num_workers))
    if num_workers:  # control: without workers it is another run
        found = differing(ours, official(0))
        assert ".metrics.0.loss_cls" in found and ".model.roi_heads.res5.norm.running_var" in found


def test_run_from_pretrained_weights_is_equal(
    shapes, official, tmp_path, monkeypatch, backbone_file
):
    theirs = official(2, backbone_file)
    run = make_run(shapes, tmp_path, 2, MODEL__WEIGHTS=backbone_file)
    assert_equal(run_embedded(run, monkeypatch), theirs)
    assert differing(theirs["metrics"], official(2)["metrics"])


@pytest.mark.parametrize(
    ("num_workers", "iteration"), [(2, 3), (0, NUM_ITERATIONS - 1)], ids=["middle", "precise_bn"]
)
def test_interrupted_and_resumed_run_is_equal(
    shapes, official, tmp_path, monkeypatch, num_workers, iteration
):
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_at(patch, iteration, send_sigterm)
        EmbeddedEngine().train(make_run(shapes, tmp_path, num_workers))
    torch.manual_seed(0)
    run = make_run(shapes, tmp_path, num_workers, resume=True)
    assert_equal(run_embedded(run, monkeypatch), official(num_workers))


def keywords(settings: dict) -> dict:
    return {key.replace(".", "__"): value for key, value in settings.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_run_with_evaluations_is_equal(shapes, official, tmp_path, monkeypatch, num_workers):
    """Precise batch norm and an evaluation every second iteration, and the draws of their loaders.
    Then stopped where an evaluation is left to do."""
    theirs = official(num_workers, **keywords(EVALUATED))
    assert [SCORES[0] in of for of in theirs["metrics"]] == [False, True] * 2 + [False] * 2 + [True]
    run = make_run(shapes, tmp_path / "whole", num_workers, **keywords(EVALUATED))
    assert_equal(run_embedded(run, monkeypatch), theirs)
    if num_workers:
        return
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_at(patch, 3, send_sigterm)
        EmbeddedEngine().train(make_run(shapes, folder, num_workers, **keywords(EVALUATED)))
    torch.manual_seed(0)
    run = make_run(shapes, folder, num_workers, resume=True, **keywords(EVALUATED))
    assert_equal(run_embedded(run, monkeypatch), theirs)
    # Control: evaluations leave another model, by what their loaders draw.
    without = {**EVALUATED, "TEST.EVAL_PERIOD": 0}
    run = make_run(shapes, tmp_path / "without", num_workers, **keywords(without))
    ours = run_embedded(run, monkeypatch)
    assert ".roi_heads.box_predictor.cls_score.weight" in differing(ours["model"], theirs["model"])


def test_run_with_clipped_gradients_is_equal(shapes, official, tmp_path, monkeypatch):
    theirs = official(0, **keywords(CLIPPED))
    run = make_run(shapes, tmp_path / "clipped", 0, **keywords(CLIPPED))
    assert_equal(run_embedded(run, monkeypatch), theirs)
    for changed in ({"CLIP_TYPE": "value"}, {"CLIP_VALUE": 0.03}, {"NORM_TYPE": 1.0}):  # controls
        name, value = next(iter(changed.items()))
        others = {**CLIPPED, f"SOLVER.CLIP_GRADIENTS.{name}": value}
        run = make_run(shapes, tmp_path / name, 0, **keywords(others))
        assert len(differing(run_embedded(run, monkeypatch)["momentum"], theirs["momentum"])) > 50


def test_stateless_stream_is_another_run(shapes, official, tmp_path, monkeypatch):
    """Negative control."""
    run = make_run(shapes, tmp_path, 0, DATALOADER__STREAM="stateless")
    ours = run_embedded(run, monkeypatch)
    found = differing(ours, official(0))
    assert ".metrics.0.loss_cls" in found and ".model.roi_heads.res5.norm.running_var" in found
