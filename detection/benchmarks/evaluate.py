"""Seconds of scoring a VOC result set: Detectron2's evaluator and this project's, side by side.

Both score the same detections of the same generated xml files, and their numbers are printed
too. Detectron2's evaluator reads the xml files itself; here they are read once, before training.
So there are two comparisons: with the annotations in memory on both sides, and with reading them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from detection.benchmarks.voc_set import SPLIT, write_voc_set
from detection.config import load_detection_config
from detection.data.datasets import check_and_load
from detection.data.voc import VOC_CLASSES, load_records, resolve_datasets
from detection.engines.base import Run
from detection.engines.d2 import Detectron2Engine
from detection.engines.d2_scores import voc_scores
from detection.evaluation.voc_ap import Detections, evaluate_voc
from moco.benchmarks.record import alternate, compare, table, write_results
from moco.distributed import ProcessInfo
from moco.errors import ConfigError

OURS, THEIRS = "this project", "detectron2"
_SCORES = ("AP50", "AP", "AP75")


def run(
    *, num_images: int, mean_detections: float, year: int, num_rounds: int, output: Path
) -> None:
    """Measure, print tables and write JSON; without Detectron2 only this project is measured.

    Args:
        mean_detections: per image.
        year: 2007 or 2012, the metric's.
        num_rounds: how often each side scores everything.
    Raises: ConfigError for less than 1 image or 3 rounds.
    """
    if num_images < 1 or num_rounds < 3:
        raise ConfigError(
            f"--images {num_images} --rounds {num_rounds}: at least 1 and 3 are needed, the latter "
            "for a median with quartiles"
        )
    torch.set_num_threads(1)  # neither side uses more; nothing else shall either
    with tempfile.TemporaryDirectory() as folder:
        detections = write_voc_set(Path(folder) / "voc", num_images, mean_detections)
        sides = _Sides(_run_of(Path(folder), year), detections)
        content = {"images": num_images, "detections": sides.num_detections, "year": year}
        # In this order: Detectron2's evaluator remembers what it read.
        for what, pair in (
            ("annotations read", sides.reading()),
            ("annotations in memory", sides.in_memory()),
        ):
            baseline = next(iter(pair))
            content[what] = compare(alternate(pair, num_rounds), baseline)
            print(f"\n**{what}**, {sides.num_detections} detections in {num_images} images\n")
            print(table(content[what], baseline))
        content["scores"] = sides.scores
        for name, scores in sides.scores.items():
            print(f"\n{name}: " + ", ".join(f"{key} {scores[key]!r}" for key in _SCORES), end="")
        write_results(output, content, sides.versions)
    print(f"\n\nwritten: {output}")


class _Sides:
    """The jobs of both sides; `scores` are the last ones of each."""

    def __init__(self, run: Run, detections: Detections):
        self._run, self._detections, self._records = run, detections, run.data.test_records
        (self._spec,) = resolve_datasets(run.cfg, "TEST")
        self.num_detections = sum(len(scores) for _, scores, _ in detections.values())
        self.scores: dict[str, dict[str, float | None]] = {}
        engine = Detectron2Engine()
        missing = engine.unavailable_reason()
        if missing:
            print(f"Detectron2 is left out: {missing}")
        self._names = (OURS,) if missing else (THEIRS, OURS)
        self.versions = {} if missing else engine.versions()

    def reading(self) -> dict[str, Callable[[int], None]]:
        return self._jobs(
            {
                THEIRS: lambda: voc_scores(self._run, self._records, self._detections),
                OURS: lambda: self._score(load_records(self._spec)[0]),
            }
        )

    def in_memory(self) -> dict[str, Callable[[int], None]]:
        def theirs() -> dict[str, float]:
            return voc_scores(self._run, self._records, self._detections, read_anew=False)

        return self._jobs({THEIRS: theirs, OURS: lambda: self._score(self._records)})

    def _jobs(self, score: dict[str, Callable[[], dict]]) -> dict[str, Callable[[int], None]]:
        def job(name: str) -> Callable[[int], None]:
            return lambda _: self.scores.update({name: score[name]()})

        return {name: job(name) for name in self._names}

    def _score(self, records: list[dict]) -> dict[str, float | None]:
        data = self._run.data
        result = evaluate_voc(self._detections, records, data.class_names, data.metric_year)
        scores = {"AP": result.ap, "AP50": result.ap50, "AP75": result.ap75}
        return {key: None if math.isnan(score) else score for key, score in scores.items()}


def _run_of(folder: Path, year: int) -> Run:
    """A run that could have made the detections."""
    settings = {
        "DATASETS.VOC_ROOT": str(folder / "voc"),
        "DATASETS.VOC_CLASSES": VOC_CLASSES,
        "DATASETS.VOC_METRIC": year,
        "DATASETS.TRAIN": (SPLIT,),
        "DATASETS.TEST": (SPLIT,),
        "MODEL.ROI_HEADS.NUM_CLASSES": len(VOC_CLASSES),
    }
    cfg = load_detection_config(None, [word for pair in settings.items() for word in pair])
    return Run(
        cfg=cfg,
        data=check_and_load(cfg),
        output_dir=folder / "run",
        seed=0,
        process=ProcessInfo(0, 1, 0, torch.device("cpu")),
        config_digest="benchmark",
    )
