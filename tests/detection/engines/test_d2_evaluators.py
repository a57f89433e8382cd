"""The Detectron2 engine's second opinion: Detectron2's own VOC evaluator beside ours."""

import re
import shutil

import numpy as np
import pytest

pytest.importorskip("detectron2")

from detectron2_runs import CLASSES, make_run, make_shapes  # noqa: E402

from detection.engines.d2 import Detectron2Engine  # noqa: E402
from detection.evaluation.voc_ap import evaluate_voc  # noqa: E402

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes")


def near_the_truth(records, seed=0):
    """Detections scattered round the objects, with scores that differ at three decimals."""
    rng = np.random.default_rng(seed)
    score = iter(rng.permutation(np.arange(1, 1000)) / 1000)
    detections = {}
    for record in records:
        boxes, scores, classes = [], [], []
        for annotation in record["annotations"] * 3:
            boxes.append(np.asarray(annotation["bbox"]) + rng.normal(0, 3, 4))
            scores.append(next(score))
            wrong = rng.random() < 0.2
            classes.append((annotation["category_id"] + wrong) % len(CLASSES))
        detections[record["image_id"]] = (
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(scores, np.float32),
            np.array(classes, np.int64),
        )
    return detections


@pytest.fixture
def copy_of_shapes(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "copy")


def edit_xml(root, edit):
    for path in sorted((root / "Annotations").glob("test_*.xml")):
        path.write_text(edit(path.read_text()))


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("difficult", [False, True])
def test_both_evaluators_agree(copy_of_shapes, tmp_path, year, difficult):
    old, new = "<difficult>0</difficult>", "<difficult>1</difficult>"
    if difficult:
        edit_xml(copy_of_shapes, lambda text: text.replace(old, new, 1))
    run = make_run(copy_of_shapes, tmp_path / "run", DATASETS__VOC_METRIC=year)
    records = run.data.test_records
    detections = near_the_truth(records)
    ours = evaluate_voc(detections, records, CLASSES, year, True)
    theirs = Detectron2Engine().second_opinion(run, records, detections)
    assert 5 < theirs["AP"] < theirs["AP50"] < 95
    assert theirs == {"AP": ours.ap, "AP50": ours.ap50, "AP75": ours.ap75}


def test_its_memory_of_annotations_is_dropped(copy_of_shapes, tmp_path):
    run = make_run(copy_of_shapes, tmp_path / "run")
    records = run.data.test_records
    detections = near_the_truth(records)
    before = Detectron2Engine().second_opinion(run, records, detections)
    edit_xml(copy_of_shapes, lambda text: text.replace("<difficult>0", "<difficult>1"))
    assert Detectron2Engine().second_opinion(run, records, detections) != before


@pytest.mark.parametrize(
    "edit, reason",
    [
        (lambda text: text.replace("</xmin>", ".5</xmin>"), "test_00000.xml: ValueError.*'.*\\.5'"),
        (lambda text: text.replace("<difficult>0</difficult>", ""), "xml: AttributeError"),
    ],
)
def test_what_its_evaluator_cannot_read_is_a_reason_not_a_crash(
    copy_of_shapes, tmp_path, capsys, edit, reason
):
    edit_xml(copy_of_shapes, edit)
    run = make_run(copy_of_shapes, tmp_path / "run")
    records = run.data.test_records
    opinion = Detectron2Engine().second_opinion(run, records, near_the_truth(records))
    assert (opinion["AP"], opinion["AP50"], opinion["AP75"]) == (None, None, None)
    assert re.search(reason, opinion["reason"])
    assert "evaluator gives no score" in capsys.readouterr().out
