"""What a run says of test images in the pretraining set: printed, in results and in reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from detection import leaks, trials
from detection.config import load_detection_config
from detection.data.shapes import make_shapes_dataset
from detection.report_sections import detection_sections
from moco.data.image_hash import hash_file
from moco.data.image_rows import ROW_BYTES
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError
from moco.training.checkpoint import sha256_of, write_json_atomic
from moco.training.image_record import REPORT_KEY, ImageRecord, Unknown, write_beside

NAME = "test_images_in_pretraining"
CLASSES = ("circle", "square")
PROCESS = ProcessInfo(0, 1, 0, torch.device("cpu"))


class NoDetections:
    """An engine that trains nothing and finds nothing."""

    name = "none"

    def versions(self):
        return {"none": "1"}

    def check(self, cfg, *, eval_only):
        return "nothing loaded"

    def train(self, run):
        pass

    def predict(self, run, records):
        boxes, scores = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        return {record["image_id"]: (boxes, scores, np.zeros(0, np.int64)) for record in records}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    return make_shapes_dataset(
        root, num_train=3, num_test=3, num_unlabelled=0, size=64, seed=0, class_names=CLASSES
    )


def images_of(root: Path, split: str) -> list[Path]:
    ids = (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    return [next((root / "JPEGImages").glob(f"{name}.*")) for name in ids]


def weights_of(folder: Path, record: ImageRecord | Unknown) -> Path:
    """A weights file with its report, as the converter leaves them."""
    path = folder / "moco.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    about = write_beside(path, record)
    report = {"output_sha256": sha256_of(path), REPORT_KEY: about}
    write_json_atomic(f"{path}.conversion.json", report)
    return path


def record_of(paths: list[Path], lacks: str = "") -> ImageRecord:
    rows = [hash_file(path) for path in paths]
    return ImageRecord(np.stack(rows) if rows else np.zeros((0, ROW_BYTES), np.uint8), lacks)


def job(shapes, out: Path, weights: str) -> trials.Job:
    keys = {
        "DATASETS.VOC_ROOT": str(shapes),
        "DATASETS.VOC_CLASSES": str(CLASSES),
        "DATASETS.TRAIN": "('train',)",
        "DATASETS.TEST": "('test',)",
        "MODEL.ROI_HEADS.NUM_CLASSES": "2",
        "MODEL.WEIGHTS": str(weights),
        "OUTPUT_DIR": str(out),
    }
    cfg = load_detection_config(None, [word for pair in keys.items() for word in pair])
    return trials.prepare(cfg, NoDetections(), "test", PROCESS)


CASES = {
    "all leaked": (
        lambda root: record_of(images_of(root, "test") + images_of(root, "train")),
        "warning: 3 of 3 test images were in the pretraining set of these weights (3 exact, 0 near",
    ),
    "one leaked": (
        lambda root: record_of(images_of(root, "test")[:1]),
        "warning: 1 of 3 test images was in the pretraining set of these weights (1 exact, 0 near",
    ),
    "training images only": (
        lambda root: record_of(images_of(root, "train")),
        "test images: none of 3 test images was in the pretraining set of these weights (3 images)",
    ),
    "part": (
        lambda root: record_of(images_of(root, "test")[:2], "the first 9 steps were not recorded"),
        "warning: at least 2 of 3 test images were in the pretraining set of these weights (2 ex",
    ),
    "unknown": (
        lambda root: Unknown("theirs.pth has no record of its images"),
        "test images: unknown whether test images were in the pretraining set of these weights: "
        "theirs.pth has no record of its images",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_printed_and_in_every_result_and_report(case, shapes, tmp_path, capsys):
    make, line = CASES[case]
    weights = weights_of(tmp_path, make(shapes))
    results = trials.run_trials(job(shapes, tmp_path / "out", weights), 1)
    printed = capsys.readouterr().out
    assert any(said.startswith(line) for said in printed.splitlines()), printed
    words = line.partition(": ")[2]
    out = tmp_path / "out"
    assert results[NAME]["words"].startswith(words)
    assert json.loads((out / "trial_0" / "result.json").read_text())[NAME] == results[NAME]
    assert json.loads((out / "results.json").read_text())[NAME] == results[NAME]
    assert f"- test images: {words}" in (out / "results.md").read_text()
    section = detection_sections(out, "x")[0]
    assert any(str(block).startswith(f"Test images: {words}") for block in section.blocks)


def test_random_initialisation_has_nothing_to_say(shapes, tmp_path, capsys):
    results = trials.run_trials(job(shapes, tmp_path / "out", ""), 1)
    assert NAME not in results and NAME not in results["trials"][0]
    assert "test images:" not in capsys.readouterr().out
    assert "test images:" not in (tmp_path / "out" / "results.md").read_text()


def test_a_fine_tuned_model_is_judged_by_the_weights_its_run_began_with(shapes, tmp_path):
    weights = weights_of(tmp_path, record_of(images_of(shapes, "test")))
    run = tmp_path / "trial_0"
    run.mkdir()
    model = run / "model_final.pth"
    torch.save({}, model)
    assert "has no report of a conversion" in leaks.find_record(model).reason
    began = {"path": str(weights), "sha256": sha256_of(weights)}
    write_json_atomic(run / "result.json", {"weights": began})
    assert len(leaks.find_record(model).rows) == 3
    write_json_atomic(run / "result.json", {"weights": {"path": "", "sha256": None}})
    assert len(leaks.find_record(model).rows) == 0  # random initialisation
    write_json_atomic(run / "result.json", {"weights": {**began, "sha256": "0"}})
    assert "is no longer the file that" in leaks.find_record(model).reason
    write_json_atomic(run / "result.json", {"weights": {**began, "path": "gone.pth"}})
    assert "gone.pth, which" in leaks.find_record(model).reason


def test_conversions_of_before_are_unknown_and_damage_is_an_error(shapes, tmp_path):
    weights = weights_of(tmp_path, record_of(images_of(shapes, "test")))
    report = Path(f"{weights}.conversion.json")
    content = json.loads(report.read_text())
    write_json_atomic(report, {"output_sha256": content["output_sha256"]})
    assert "an older version wrote it" in leaks.find_record(weights).reason
    write_json_atomic(report, content)
    rows = Path(f"{weights}.images.safetensors")
    shutil.copy(rows, tmp_path / "kept")
    rows.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one in"):
        leaks.find_record(weights)
    content[REPORT_KEY]["sha256"] = sha256_of(rows)
    write_json_atomic(report, content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        leaks.find_record(weights)
