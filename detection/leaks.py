"""Whether a test set's images were among those that the initial weights were pretrained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from detection.run_folder import RESULT_FILE
from detection.weights_file import find_weights
from moco.data import image_rows
from moco.errors import MocoError
from moco.training.checkpoint import read_json, sha256_of
from moco.training.image_record import ImageRecord, Unknown, record_beside

_FEW_IMAGES = 1000  # looked at within seconds
_NAMES_SHOWN = 3


def check_leak(
    weights: str, test_records: Sequence[dict], say: Callable[[str], None] = print
) -> dict | None:
    """Compare the test images, by content, with those of the pretraining.

    Args:
        weights: the value of MODEL.WEIGHTS.
        test_records: of `DetectionData`.
        say: receives a line where it takes more than a few seconds.
    Returns: None for random initialisation, else plain values for results: {"words" (one line),
        "known" ("all", "part" or "no" images of the pretraining), "num_test", "num_exact",
        "num_near", "num_pretraining", "first" (up to three file names)}; the counts are None where
        nothing is known.
    Raises: CheckpointError where the record is damaged.
    """
    if not weights:
        return None
    record = find_record(find_weights(weights))
    if isinstance(record, Unknown):
        words = (
            "unknown whether test images were in the pretraining set of these weights: "
            f"{record.reason}"
        )
        counts = dict.fromkeys(("num_exact", "num_near", "num_pretraining"))
        return {"words": words, "known": "no", "num_test": len(test_records), **counts, "first": []}
    from moco.data import image_hash  # with OpenCV, which detection needs for nothing else

    names = [record["file_name"] for record in test_records]
    if len(names) > _FEW_IMAGES:
        say(f"comparing {len(names)} test images with {len(record.rows)} of the pretraining")
    rows = np.stack(list(image_hash.in_threads(image_hash.hash_file, names)))
    found = image_rows.match(rows, record.rows)
    counts = {
        "num_exact": int((found.kind == image_rows.EXACT).sum()),
        "num_near": int((found.kind == image_rows.NEAR).sum()),
        "num_pretraining": len(record.rows),
    }
    first = [Path(names[number]).name for number in np.flatnonzero(found.kind)[:_NAMES_SHOWN]]
    return {
        "words": _words(len(names), record, counts, first),
        "known": "part" if record.lacks else "all",
        "num_test": len(names),
        **counts,
        "first": first,
    }


def _words(num_test: int, record: ImageRecord, counts: dict, first: Sequence[str]) -> str:
    exact, near = counts["num_exact"], counts["num_near"]
    leaked, num_known = exact + near, len(record.rows)
    end = f"; known of it are {num_known} images, since {record.lacks}" if record.lacks else ""
    if not leaked and record.lacks:
        return (
            f"none of {num_test} test images is known to have been in the pretraining set of these "
            f"weights{end}"
        )
    if not leaked:
        return (
            f"none of {num_test} test images was in the pretraining set of these weights "
            f"({num_known} images)"
        )
    least = "at least " if record.lacks else ""
    shown = ", ".join(first) + (", ..." if leaked > len(first) else "")
    verb = "was" if leaked == 1 else "were"
    return (
        f"{least}{leaked} of {num_test} test images {verb} in the pretraining set of these weights "
        f"({exact} exact, {near} near copies: {shown}){end}"
    )


def line_of(leak: dict | None) -> str | None:
    """The line to print at the start; None where there is nothing to say."""
    if leak is None:
        return None
    is_warning = bool(leak["num_exact"] or leak["num_near"])
    return f"warning: {leak['words']}" if is_warning else f"test images: {leak['words']}"


def find_record(path: Path) -> ImageRecord | Unknown:
    """The images that a weights file, converted or fine-tuned, was pretrained on.

    A fine-tuned model's are those of the weights that its run began with.
    Raises: CheckpointError where a record is damaged.
    """
    found = record_beside(path)
    if found is not None:
        return found
    start = _start_of_run(path.parent)
    if start is None:
        return Unknown(
            f"{path} has no report of a conversion beside it ({path.name}.conversion.json); "
            "convert a checkpoint of tools/pretrain.py, and keep the three files together"
        )
    return start


def _start_of_run(folder: Path) -> ImageRecord | Unknown | None:
    """The record of the weights that the run in a folder began with; None where it holds no run."""
    result = folder / RESULT_FILE
    if not result.is_file():
        return None
    content = read_json(result)
    weights = content.get("weights") if isinstance(content, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    if not weights.get("path"):
        return ImageRecord(np.zeros((0, image_rows.ROW_BYTES), np.uint8))
    try:
        path = find_weights(weights["path"])
        same = sha256_of(path) == weights.get("sha256")
    except (MocoError, OSError):
        return Unknown(f"{weights['path']}, which {result} began with, is gone")
    if not same:
        return Unknown(f"{path} is no longer the file that {result} began with")
    beside = record_beside(path)
    if beside is None:
        return Unknown(f"{path}, which {result} began with, has no record of its images")
    return beside
