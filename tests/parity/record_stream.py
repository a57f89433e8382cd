"""Detectron2's training stream, recorded: `python tests/parity/record_stream.py` (in the root of
the project, where Detectron2 is importable) rewrites golden/detectron2_stream.json.

A case runs Detectron2's seeding, its two loaders (training, precise batch norm) with their worker
processes, and its augmentations, on blank images of the records' sizes: what is recorded of each
sample is [index of the record, height, width, flipped].
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from detection.config import load_detection_config
from detection.data.detectron2_stream import Detectron2Stream
from detection.data.loader import SampleDraw
from detection.data.transforms import shortest_edge_shape

GOLDEN = Path(__file__).parent / "golden" / "detectron2_stream.json"
NUM_BATCHES = 14
NUM_PRECISE_BN = 5
MAX_SIZE = 90  # some images reach it
# (height, width, number of boxes): wide, tall and square, three without boxes
IMAGES = (
    *((41, 59, 1), (67, 43, 2), (50, 50, 1), (33, 61, 0), (45, 58, 3), (71, 29, 1), (39, 77, 1)),
    *((62, 47, 0), (44, 83, 2), (57, 51, 1), (36, 37, 1), (49, 35, 0), (52, 66, 1)),
)
CUT = {
    "INPUT.MIN_SIZE_TRAIN": (40, 47, 53, 58, 61),
    "INPUT.MAX_SIZE_TRAIN": MAX_SIZE,
    "SOLVER.MAX_ITER": NUM_BATCHES,
    "SOLVER.STEPS": (),
    "TEST.PRECISE_BN.NUM_ITER": NUM_PRECISE_BN,
}


@dataclass(frozen=True)
class StreamCase:
    """One rank of one run: `share` images a batch, emulated or real workers."""

    num_workers: int
    share: int
    grouped: bool = True
    seed: int = 7
    rank: int = 0
    world_size: int = 1
    settings: dict = field(default_factory=dict)

    def pairs(self) -> list:
        settings = {
            **CUT,
            "DATALOADER.NUM_WORKERS": self.num_workers,
            "DATALOADER.ASPECT_RATIO_GROUPING": self.grouped,
            "SOLVER.IMS_PER_BATCH": self.share * self.world_size,
            "SEED": self.seed,
            **self.settings,
        }
        return [item for pair in settings.items() for item in pair]


CASES = {
    "no workers": StreamCase(0, 2),
    "one worker": StreamCase(1, 3),
    "two workers": StreamCase(2, 2),
    "two workers, batches of 3": StreamCase(2, 3, seed=0),
    "three workers": StreamCase(3, 2),
    "three workers, batches of 1": StreamCase(3, 1, seed=123456),
    "no workers, batches of 5": StreamCase(0, 5),
    "not grouped, no workers": StreamCase(0, 3, grouped=False),
    "not grouped, three workers": StreamCase(3, 2, grouped=False),
    "sizes from a range": StreamCase(
        2,
        2,
        settings={"INPUT.MIN_SIZE_TRAIN": (40, 70), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
    ),
    "one size": StreamCase(0, 2, settings={"INPUT.MIN_SIZE_TRAIN": (53,)}),
    "no flips": StreamCase(2, 2, settings={"INPUT.RANDOM_FLIP": "none"}),
    "empty images too": StreamCase(2, 2, settings={"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}),
    "rank 0 of 2": StreamCase(2, 2, world_size=2),
    "rank 1 of 2": StreamCase(2, 2, world_size=2, rank=1),
    "rank 2 of 3, no workers": StreamCase(0, 1, world_size=3, rank=2),
}


@dataclass
class Observed:
    """Batches of [index, height, width, flipped], and the generators afterwards."""

    training: list
    precise_bn: list
    torch_state: torch.Tensor
    numpy_state: tuple

    def draws(self) -> dict:
        return {"training": self.training, "precise_bn": self.precise_bn}


def records() -> list[dict]:
    """Detectron2's dicts of `IMAGES`, without files."""
    return [
        {
            "file_name": f"{index}.png",
            "image_id": str(index),
            "height": height,
            "width": width,
            "annotations": [
                {"bbox": [1.0 + k, 2.0, 20.0, 29.0], "bbox_mode": 0, "category_id": k}
                for k in range(num_boxes)
            ],
        }
        for index, (height, width, num_boxes) in enumerate(IMAGES)
    ]


def _draw_as_a_model_would() -> None:
    """Between seeding and loader the model is built, between two batches it is trained."""
    torch.rand(5)


def take(batches: Iterable[list], number: int) -> list[list]:
    taken = []
    for batch in itertools.islice(batches, number):
        taken.append(batch)
        _draw_as_a_model_would()
    return taken


def embedded(case: StreamCase, changes: dict | None = None, *, start: int = 0) -> Observed:
    """Our replay; `changes` are of `StreamCase` (negative controls)."""
    case = StreamCase(**{**vars(case), **(changes or {})})
    cfg = load_detection_config(None, case.pairs())
    stream = Detectron2Stream(
        records(), cfg, seed=case.seed, rank=case.rank, world_size=case.world_size
    )
    kept = [r for r in records() if r["annotations"]]
    kept = kept if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else records()

    def described(batches: Iterator[list[SampleDraw]]) -> Iterator[list]:
        for batch in batches:
            yield [_described(kept[draw.index], draw) for draw in batch]

    stream.seed_torch()
    _draw_as_a_model_would()
    training = take(described(stream.training_draws(start)), NUM_BATCHES)
    precise_bn = take(described(stream.precise_bn_draws()), NUM_PRECISE_BN)
    return Observed(
        training, precise_bn, torch.get_rng_state(), stream.main_numpy.get_state(legacy=True)
    )


def _described(record: dict, draw: SampleDraw) -> list:
    size = shortest_edge_shape(record["height"], record["width"], draw.short_edge, MAX_SIZE)
    return [int(record["image_id"]), *size, draw.flip]


def detectron2(case: StreamCase) -> Observed:
    """Detectron2 itself, told that it is `case.rank` of `case.world_size`."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, build_detection_train_loader
    from detectron2.data import transforms as T
    from detectron2.data.detection_utils import build_augmentation
    from detectron2.utils.env import seed_all_rng

    cfg = get_cfg()
    cfg.merge_from_list(case.pairs())
    cfg.DATASETS.TRAIN = ("stream_case",)
    augmentations = T.AugmentationList(build_augmentation(cfg, True))

    def mapper(record: dict) -> dict:
        seen = T.AugInput(np.zeros((record["height"], record["width"], 3), dtype=np.uint8))
        transforms = augmentations(seen).transforms
        flipped = any(isinstance(t, T.HFlipTransform) for t in transforms)
        drawn = [int(record["image_id"]), *seen.image.shape[:2], flipped]
        return {"width": record["width"], "height": record["height"], "drawn": drawn}

    def drawn(loader: Iterable[list[dict]]) -> Iterator[list]:
        for batch in loader:
            yield [sample["drawn"] for sample in batch]

    DatasetCatalog.register("stream_case", records)
    try:
        with _ranks(case):
            seed_all_rng(case.seed + case.rank)
            _draw_as_a_model_would()
            training = build_detection_train_loader(cfg, mapper=mapper)
            cfg.DATALOADER.NUM_WORKERS = 0  # as DefaultTrainer.build_hooks
            precise_bn = build_detection_train_loader(cfg, mapper=mapper)
            return Observed(
                take(drawn(training), NUM_BATCHES),
                take(drawn(precise_bn), NUM_PRECISE_BN),
                torch.get_rng_state(),
                np.random.get_state(legacy=True),
            )
    finally:
        DatasetCatalog.remove("stream_case")


def _ranks(case: StreamCase):
    return mock.patch.multiple(
        "torch.distributed",
        is_initialized=lambda: True,
        get_rank=lambda *_: case.rank,
        get_world_size=lambda *_: case.world_size,
    )


def main() -> None:
    import detectron2 as package

    versions = {"detectron2": package.__version__, "torch": torch.__version__}
    versions["numpy"] = np.__version__
    recorded = {name: detectron2(case).draws() for name, case in CASES.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(draws)}" for name, draws in recorded.items()]
    lines.insert(0, f'"versions": {json.dumps(versions)}')
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
