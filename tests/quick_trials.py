"""Detection trials whose engine keeps checkpoints as the real ones do but trains nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from detection import report, trials
from detection.config import load_detection_config
from detection.data.shapes import make_shapes_dataset
from detection.engines.base import FINAL_MODEL, TrainingStopped
from detection.engines.run_files import periodic_path, read_state, write_state
from detection.engines.session import is_complete, state_to_resume
from moco.distributed import ProcessInfo

PROCESS = ProcessInfo(0, 1, 0, torch.device("cpu"))
CLASSES = ("circle", "square")
NUM_ITERATIONS = 8


class QuickEngine:
    """Its "weights" are the seed and the iterations that were done, with the data they were on.

    stop_after: stop as SIGTERM does, once so many iterations are done in all.
    """

    name = "quick"

    def __init__(self):
        self.stop_after: int | None = None

    def versions(self):
        return {"quick": "1"}

    def check(self, cfg, *, eval_only):
        return "nothing loaded"

    def train(self, run):
        path = state_to_resume(run) if run.resume else None
        seen = []
        if path is not None:
            if is_complete(run, path):
                return
            seen = read_state(run, path, engine=self.name, keys=("model",))["model"]["seen"]
        for iteration in range(len(seen), run.cfg.SOLVER.MAX_ITER):
            seen.append(len(run.data.train_records))
            if iteration + 1 == self.stop_after:
                self._write(run, periodic_path(run.output_dir, iteration), seen)
                raise TrainingStopped("stopped")
        self._write(run, run.output_dir / FINAL_MODEL, seen)

    def predict(self, run, records):
        """All objects of all images but as many as the seed."""
        if not run.eval_only:
            read_state(run, run.output_dir / FINAL_MODEL, engine=self.name, keys=("model",))
        return {
            record["image_id"]: (
                np.array([a["bbox"] for a in record["annotations"]], np.float32).reshape(-1, 4),
                np.ones(len(record["annotations"]), np.float32),
                np.array([a["category_id"] for a in record["annotations"]], np.int64),
            )
            for record in records[run.seed :]
        }

    def _write(self, run, path, seen):
        content = {"model": {"seen": seen}}
        write_state(run, path, content, iteration=len(seen) - 1, engine=self.name)


def make_data(folder: Path) -> Path:
    return make_shapes_dataset(
        folder, num_train=8, num_test=6, num_unlabelled=0, size=64, seed=0, class_names=CLASSES
    )


def make_job(root: Path, out: Path, engine: QuickEngine, *overrides, allow_change=()):
    keys = {
        "DATASETS.VOC_ROOT": str(root),
        "DATASETS.VOC_CLASSES": str(CLASSES),
        "DATASETS.TRAIN": "('train',)",
        "DATASETS.TEST": "('test',)",
        "MODEL.ROI_HEADS.NUM_CLASSES": "2",
        "SOLVER.MAX_ITER": str(NUM_ITERATIONS),
        "SOLVER.STEPS": "()",
        "OUTPUT_DIR": str(out),
        **dict(zip(overrides[::2], overrides[1::2], strict=True)),
    }
    cfg = load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
    return trials.prepare(cfg, engine, "test", PROCESS, allow_change=allow_change)


def halve_training_split(root: Path) -> None:
    path = root / "ImageSets" / "Main" / "train.txt"
    ids = path.read_text().splitlines()
    path.write_text("\n".join(ids[: len(ids) // 2]) + "\n")


def reverse_training_split(root: Path) -> None:
    path = root / "ImageSets" / "Main" / "train.txt"
    path.write_text("\n".join(reversed(path.read_text().split())) + "\n")


def edit(root: Path, image_id: str, pattern: str, new: str) -> None:
    """Replace the first match in the annotation of an image."""
    path = root / "Annotations" / f"{image_id}.xml"
    text, count = re.subn(pattern, new, path.read_text(), count=1)
    assert count == 1 and text != path.read_text()
    path.write_text(text)


def draw_nothing(monkeypatch) -> None:
    """Pictures and plots take most of the time of such trials."""
    monkeypatch.setattr(trials, "save_detection_pictures", lambda *_, **options: None)
    monkeypatch.setattr(report, "write_plot", lambda *_: None)
    monkeypatch.setattr(report, "write_curves_report", lambda *_: "")
