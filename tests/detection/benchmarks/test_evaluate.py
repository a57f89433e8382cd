"""The measurement of scoring: its generated set, both sides' numbers, the file it writes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from detection.benchmarks.voc_set import SPLIT, write_voc_set
from detection.data.voc import VOC_CLASSES, DatasetSpec, load_records
from detection.evaluation.voc_ap import evaluate_voc
from moco.errors import ConfigError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmark.py"


def measure(output: Path, *arguments: str) -> dict:
    words = ["evaluate", "--images", "12", "--rounds", "3", "--output", str(output), *arguments]
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL))["main"](words)
    assert end.value.code == 0
    return json.loads(output.read_text())


def test_the_generated_set_is_like_a_detectors_results(tmp_path):
    found = write_voc_set(tmp_path / "voc", 200, 30.0, seed=1)
    spec = DatasetSpec("x", str(tmp_path / "voc"), SPLIT, VOC_CLASSES, 2007)
    records, report = load_records(spec)
    assert report.problems == [] and len(records) == len(found) == 200
    num_found = [len(scores) for _, scores, _ in found.values()]
    num_objects = sum(len(record["annotations"]) for record in records)
    assert 27 < np.mean(num_found) < 33 and 500 < num_objects < 700
    hard = sum(a["difficult"] for record in records for a in record["annotations"])
    assert 0.1 < hard / num_objects < 0.3
    result = evaluate_voc(found, records, VOC_CLASSES, 2007)
    assert 30 < result.ap < 60 and result.ap75 < result.ap50
    again = write_voc_set(tmp_path / "again", 200, 30.0, seed=1)
    assert all(np.array_equal(a, b) for k in found for a, b in zip(found[k], again[k], strict=True))


@pytest.mark.detectron2
def test_both_sides_are_measured_and_agree(tmp_path, capsys):
    pytest.importorskip("detectron2")
    content = measure(tmp_path / "out" / "e.json")
    out = capsys.readouterr().out
    assert "| this project |" in out and "| detectron2 |" in out and "written: " in out
    for what in ("annotations read", "annotations in memory"):
        assert set(content[what]) == {"detectron2", "this project"}
        assert content[what]["detectron2"]["speedup"] == 1.0
        assert content[what]["this project"]["rounds"] == 3
    ours, theirs = content["scores"]["this project"], content["scores"]["detectron2"]
    assert ours.keys() == theirs.keys() == {"AP", "AP50", "AP75"}
    # So few scores hardly tie; where they do, Detectron2's order is the CPU's.
    assert ours["AP"] == pytest.approx(theirs["AP"], abs=2)
    assert {"command", "machine", "versions"} <= content.keys()
    assert "detectron2" in content["versions"]


def test_without_detectron2_this_project_is_measured_alone(tmp_path):
    code = (
        "import sys, runpy; sys.modules['detectron2'] = None\n"
        f"sys.argv = [{str(TOOL)!r}, 'evaluate', '--images', '5', '--rounds', '3', '--output', "
        f"{str(tmp_path / 'e.json')!r}]\n"
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Detectron2 is left out: " in done.stdout
    content = json.loads((tmp_path / "e.json").read_text())
    assert set(content["annotations read"]) == {"this project"}


def test_too_few_rounds_are_refused(tmp_path):
    from detection.benchmarks import evaluate

    with pytest.raises(ConfigError, match="--rounds 2: at least 1 and 3 are needed"):
        evaluate.run(
            num_images=5, mean_detections=3, year=2007, num_rounds=2, output=tmp_path / "e.json"
        )
