"""The detector on the pretend device: iterations of training, and test images."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path

from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.shapes import make_shapes_dataset
from detection.engines.base import Run
from detection.engines.embedded import engine as engine_module
from support.device_runs import PROCESS, Outcome, _between_calls, _difference, measure
from support.pretend_cuda import Record

CLASSES = ("circle", "square", "triangle", "cross")
KEYS = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.ROI_HEADS.NUM_CLASSES": 4,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "DATASETS.VOC_CLASSES": CLASSES,
    "DATASETS.TRAIN": ("train",),
    "DATASETS.TEST": ("test",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.PROGRESS_PERIOD": 100,
    "SOLVER.CHECKPOINT_PERIOD": 100,
    "TEST.PRECISE_BN.ENABLED": True,
    "TEST.PRECISE_BN.NUM_ITER": 1,
}
FAST = {
    "SOLVER.AMP.ENABLED": True, "TEST.AMP.ENABLED": True, "MODEL.CHANNELS_LAST": True,
}  # fmt: skip


def detector(root: Path, folder: Path, words: str, keys: dict[str, object]) -> Iterator[Outcome]:
    """A training iteration of 2 images, then a test image."""
    settings = {**KEYS, "DATASETS.VOC_ROOT": root, **keys}
    cfg = load_detection_config(None, [str(w) for pair in settings.items() for w in pair])
    data = check_and_load(cfg)
    for record in [*data.train_records, *data.test_records]:
        for annotation in record["annotations"]:
            annotation["segmentation"] = _diamond(annotation["bbox"])
    folder.mkdir(parents=True)
    run = Run(cfg, data, folder, 3, PROCESS, "digest", progress=False)

    def train(record: Record, outcome: Outcome) -> None:
        waits: list[collections.Counter] = []
        with _between_calls(engine_module, "set_lr", record, waits):
            engine_module.EmbeddedEngine().train(run)
        outcome.waits = dict(waits[2])

    def total(record: Record, num_images: int) -> collections.Counter:
        record.clear()
        engine_module.EmbeddedEngine().predict(run, data.test_records[:num_images])
        return collections.Counter(record.waits)

    def predict(record: Record, outcome: Outcome) -> None:
        outcome.waits = _difference(total(record, 3), total(record, 1), 2)

    yield measure(f"detector, {words}, training", train, unit="iteration of 2 images")
    yield measure(f"detector, {words}, test", predict, unit="image")


def _diamond(box: list[float]) -> list[list[float]]:
    x0, y0, x1, y1 = box
    return [[(x0 + x1) / 2, y0, x1, (y0 + y1) / 2, (x0 + x1) / 2, y1, x0, (y0 + y1) / 2]]


def all_runs(folder: Path) -> Iterator[Outcome]:
    root = make_shapes_dataset(
        folder / "shapes", num_train=6, num_test=3, num_unlabelled=0, size=80, seed=0,
        class_names=CLASSES,
    )  # fmt: skip
    masks = {"MODEL.MASK_ON": True}
    for words, keys in {
        "fp32": {},
        "bf16, channels last": FAST,
        "SyncBN": {"MODEL.RESNETS.NORM": "SyncBN"},
        "polygons": masks,
        "bit masks": {**masks, "INPUT.MASK_FORMAT": "bitmask"},
    }.items():
        yield from detector(root, folder / words.replace(" ", "_"), words, keys)
