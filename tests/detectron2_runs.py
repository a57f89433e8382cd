"""The small runs of the tests of the Detectron2 engine."""

from __future__ import annotations

import torch

from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.shapes import make_shapes_dataset
from detection.engines.base import Run
from detection.run_identity import RunIdentity
from moco.distributed import ProcessInfo
from moco.training.changes import Changes

PROCESS = ProcessInfo(0, 1, 0, torch.device("cpu"))
NUM_ITERATIONS = 4
CLASSES = ("circle", "square", "triangle", "cross")
TINY = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TRAIN": (61, 69),
    "INPUT.MIN_SIZE_TEST": 69,
    "DATASETS.VOC_CLASSES": CLASSES,
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
    "TEST.PRECISE_BN.NUM_ITER": 2,
}
ONE_ITERATION = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": ()}


def make_shapes(root):
    return make_shapes_dataset(root, num_train=6, num_test=5, num_unlabelled=0, size=80, seed=0)


def config(root, **keys):
    keys = {**TINY, "DATASETS.VOC_ROOT": root, **{k.replace("__", "."): v for k, v in keys.items()}}
    return load_detection_config(None, [str(word) for pair in keys.items() for word in pair])


def make_run(
    root, output_dir, *, seed=3, resume=False, eval_only=False, data=None, engine=None,
    allow_change=(), **keys,
):  # fmt: skip
    """engine: its name, where the run is to have an identity."""
    cfg = config(root, **keys)
    output_dir.mkdir(parents=True, exist_ok=True)
    data = data or check_and_load(cfg)
    return Run(
        cfg=cfg,
        data=data,
        output_dir=output_dir,
        seed=seed,
        process=PROCESS,
        config_digest="digest",
        resume=resume,
        eval_only=eval_only,
        identity=engine and RunIdentity.of(cfg, engine, None, data),
        changes=Changes(allow_change, unit="iteration"),
    )


MAX_ITER, BASE_LR = "SOLVER.MAX_ITER", "SOLVER.BASE_LR"
NUM_MORE = 2


def extend(engine, root, folder, *, allow_change=(MAX_ITER,), **keys):
    """A run of `engine` of `NUM_MORE` more iterations, which goes on from the one in `folder`."""
    keys = {"SOLVER__MAX_ITER": NUM_ITERATIONS + NUM_MORE, **keys}
    run = make_run(
        root, folder, resume=True, engine=engine.name, allow_change=allow_change, **keys
    )
    engine.train(run)
    return run
