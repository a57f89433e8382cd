"""The contract between the benchmark and whatever trains and runs the detector.

An engine gets one `Run` at a time. It owns the model, its training and its predictions; data
checks, trials, scoring and reports are the same for every engine and live outside.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moco.cfgnode import CfgNode
from moco.distributed import ProcessInfo
from moco.training.changes import Changes

if TYPE_CHECKING:
    from detection.data.datasets import DetectionData
    from detection.run_identity import RunIdentity

FINAL_MODEL = "model_final.pth"
BEST_MODEL = "model_best.pth"  # of the evaluations by TEST.EVAL_PERIOD and the last one
PERIODIC_MODELS = "model_[0-9]*.pth"

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]
Detections = Mapping[str | int, Boxes | tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]]
"""image_id -> (boxes float32 [N, 4] x0 y0 x1 y1 in original pixels, scores [N], classes [N]) and,
with MODEL.MASK_ON, as a fourth item the masks: N COCO RLE dicts of the original image's size."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning run, or one evaluation of given weights.

    Attributes:
        cfg: the frozen configuration; its OUTPUT_DIR and SEED are not read, the fields below are.
        data: the checked records.
        output_dir: this run's own folder (a trial's, under --trials).
        seed: every random draw of the run derives from it.
        process: this process's rank and device.
        config_digest: identifies configuration and initial weights; a checkpoint of another
            digest is never continued.
        resume: continue from the newest verified checkpoint in `output_dir`, if there is one.
        eval_only: predict with cfg.MODEL.WEIGHTS instead of the run's own final model.
        progress: print progress lines (metrics.json is written either way).
        identity: what checkpoints are compared with and hold; None (benchmarks, single images):
            only the digest is.
        changes: what may differ from the checkpoint that is continued, and then what did.
    """

    cfg: CfgNode
    data: DetectionData
    output_dir: Path
    seed: int
    process: ProcessInfo
    config_digest: str
    resume: bool = False
    eval_only: bool = False
    progress: bool = True
    identity: RunIdentity | None = None
    changes: Changes = field(default_factory=lambda: Changes(unit="iteration"))


class Engine(Protocol):
    """What `select_engine` returns.

    An engine may have one more method, `second_opinion(run, records, detections)`: the scores by
    an evaluator of its own, as a dict for the result files (see `detection.engines.d2`).
    """

    name: str

    def versions(self) -> dict[str, str]:
        """The versions that can change the numbers, for the result files."""

    def unavailable_reason(self) -> str | None:
        """Why the engine cannot run on this machine, or None."""

    def check(self, cfg: CfgNode, *, eval_only: bool) -> str:
        """Build the model and load cfg.MODEL.WEIGHTS; returns one line that says what was loaded.

        Raises: ConfigError or CheckpointError, before anything is trained.
        """

    def train(self, run: Run) -> None:
        """Train to the end and leave `model_final.pth` with its manifest in `run.output_dir`.

        Raises: NonFiniteError; TrainingStopped after SIGTERM, with the state saved.
        """

    def predict(self, run: Run, records: Sequence[dict]) -> Detections:
        """The detections of all `records`, on every rank."""

    def detector(self, run: Run) -> Callable[[dict], tuple]:
        """The function record -> its entry in `Detections` by which `predict` works, image by
        image, for `detection.predict`. Of a record it needs all but the annotations."""


class TrainingStopped(Exception):
    """A signal arrived; the state is saved and the message says how to go on.

    Attributes:
        exit_code: 128 + the signal's number, what a shell reports for a process ended by it.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + signal_number
