"""VOC AP against Detectron2's PascalVOCDetectionEvaluator: thousands of generated cases, bitwise.

A run makes 2000 cases; VOC_AP_CASES in the environment makes more or fewer. Both sides read the
same xml files. Compared are AP, AP50, AP75 and each curve (recall, precision and AP of each class
at each threshold). Two things of Detectron2's are changed, each in one kind of case only:
 - "ties": its np.argsort is the stable one; numpy's default orders ties by the CPU's instructions.
 - "float": its int() cuts "45.7" to 45, where its own raises ValueError.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.evaluation import pascal_voc_evaluation as theirs  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

from detection.benchmarks.voc_set import write_voc_set  # noqa: E402
from detection.data.data_check import CheckReport  # noqa: E402
from detection.data.voc import VOC_CLASSES, DatasetSpec, load_records  # noqa: E402
from detection.data.voc_check import read_annotation  # noqa: E402
from detection.evaluation import voc_ap  # noqa: E402

pytestmark = pytest.mark.detectron2

NUM_CASES = int(os.environ.get("VOC_AP_CASES", "2000"))
NUM_CONTROLS = 300  # a control needs some cases only
KINDS = ("plain", "ties", "at the threshold", "float", "sparse")
HEIGHT, WIDTH = 100, 120


@dataclass
class Case:
    kind: str
    year: int
    names: tuple[str, ...]
    ids: list[str]
    objects: dict[str, list[tuple]]  # image id -> (class, difficult, xmin, ymin, xmax, ymax)
    found: dict[str, tuple]
    records: list[dict]
    expected: tuple[float, float, float]
    curves: dict[tuple[str, float], tuple]  # (class, threshold) -> (recall, precision, AP)


def generate(seed: int) -> Case:
    """Objects and detections near them, doubled, far from them, and of wrong classes."""
    rng = np.random.default_rng(seed)
    kind, year = KINDS[seed % len(KINDS)], (2007, 2012)[seed // len(KINDS) % 2]
    names = ("cat", "dog", "pot plant", "bird")[: rng.integers(1, 5)]
    num_with_objects = max(1, len(names) - (rng.random() < 0.3))  # the rest is absent
    ids = [f"{k:06d}" for k in range(rng.integers(1, 8))]
    objects, rows = {}, []
    for image_id in ids:
        objects[image_id] = []
        for _ in range(rng.integers(0, 2 if kind == "sparse" else 5)):
            label = int(rng.integers(num_with_objects))
            hard = int(rng.random() < (0.6 if kind == "sparse" else 0.2))
            box = _object_box(rng, kind)
            objects[image_id].append((label, hard, *box))
            for _ in range(rng.integers(0, 4)):
                wrong = rng.random() < 0.15
                rows.append(
                    (image_id, int(rng.integers(len(names))) if wrong else label)
                    + tuple(_detected_box(rng, kind, box))
                )
        if rng.random() < 0.3:
            low = rng.uniform(0, 60, 2)
            rows.append(
                (image_id, int(rng.integers(len(names))), *low, *(low + rng.uniform(1, 39)))
            )
    if kind == "sparse" and rng.random() < 0.3:
        rows = []
    return Case(kind, year, names, ids, objects, _detections(rng, kind, rows), [], (), {})


def _object_box(rng: np.random.Generator, kind: str) -> tuple:
    x, y = int(rng.integers(1, 80)), int(rng.integers(1, 60))
    if kind == "at the threshold":  # a side of 20 or 40 is cut into twentieths below
        return x, y, x + int(rng.choice([19, 39])), y + int(rng.choice([19, 39]))
    right, low = x + int(rng.integers(0, 40)), y + int(rng.integers(0, 40))
    if kind != "float":
        return x, y, right, low
    x, y, right, low = np.array([x, y, right, low]) + rng.uniform(0, 0.99, 4).round(2)
    return x, y, max(x, right), max(y, low)


def _detected_box(rng: np.random.Generator, kind: str, box: tuple) -> np.ndarray:
    exact = np.array([box[0] - 1, box[1] - 1, box[2], box[3]], dtype=np.float64)
    if kind == "at the threshold":
        exact[2] = exact[0] + (exact[2] - exact[0]) * rng.integers(8, 21) / 20
        return exact
    return exact + rng.normal(0, rng.choice([0.3, 2.0, 6.0]), 4)


def _detections(rng: np.random.Generator, kind: str, rows: list[tuple]) -> dict[str, tuple]:
    if kind == "ties":
        scores = rng.choice([0.25, 0.5, 0.5004, 0.75, 0.9], len(rows))
    else:  # all different at three decimals
        scores = rng.permutation(999)[: len(rows)] / 1000 + rng.uniform(-0.0004, 0.0004, len(rows))
    found = {}
    for image_id in dict.fromkeys(row[0] for row in rows):
        own = [k for k, row in enumerate(rows) if row[0] == image_id]
        found[image_id] = (
            np.array([rows[k][2:] for k in own], dtype=np.float32),
            scores[own].astype(np.float32),
            np.array([rows[k][1] for k in own], dtype=np.int64),
        )
    return found


def write_files(case: Case, folder: Path) -> None:
    for sub in ("Annotations", "ImageSets/Main"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(case.ids) + "\n")
    for image_id in case.ids:
        lines = [
            f"<object><name>{case.names[label]}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{hard}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, hard, x0, y0, x1, y1 in case.objects[image_id]
        ]
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        text = f"<annotation>{size}{''.join(lines)}</annotation>"
        (folder / f"Annotations/{image_id}.xml").write_text(text)


def read_records(case: Case, folder: Path) -> list[dict]:
    """By our reader; all images are one and the same file."""
    report, index = CheckReport(), {name: k for k, name in enumerate(case.names)}
    records = [
        read_annotation(
            image_id, folder / f"Annotations/{image_id}.xml", folder / "image.png", index, report
        )
        for image_id in case.ids
    ]
    assert report.problems == []
    return records


def score_by_detectron2(case: Case, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Fills in `expected` and `curves`."""
    if case.kind == "ties":
        patch.setattr(theirs, "np", _numpy_with_a_stable_sort())
    if case.kind == "float":
        patch.setattr(theirs, "int", lambda text: int(float(text)), raising=False)
    voc_eval = theirs.voc_eval

    def recorded(*args, ovthresh, **options):
        case.curves[args[3], ovthresh] = voc_eval(*args, ovthresh=ovthresh, **options)
        return case.curves[args[3], ovthresh]

    patch.setattr(theirs, "voc_eval", recorded)
    theirs.parse_rec.cache_clear()  # it remembers xml files by their names
    name = f"voc_ap_cases_{folder.name}"
    MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        dirname=str(folder), split="test", year=case.year, thing_classes=list(case.names)
    )
    evaluator = theirs.PascalVOCDetectionEvaluator(name)
    evaluator.reset()
    for image_id, (boxes, scores, classes) in case.found.items():
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.from_numpy(boxes))
        instances.scores = torch.from_numpy(scores)
        instances.pred_classes = torch.from_numpy(classes)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    with np.errstate(all="ignore"):
        scores = evaluator.evaluate()["bbox"]
    case.expected = scores["AP"], scores["AP50"], scores["AP75"]


def _numpy_with_a_stable_sort() -> SimpleNamespace:
    stable = SimpleNamespace(**{k: getattr(np, k) for k in dir(np) if not k.startswith("__")})
    stable.argsort = lambda values: np.argsort(values, kind="stable")
    return stable


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # ten thousands of files
    out = []
    with tempfile.TemporaryDirectory(dir=in_memory) as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", name)  # for the evaluator's own files
        folder = Path(name)
        Image.new("L", (WIDTH, HEIGHT)).save(folder / "image.png")
        for seed in range(NUM_CASES):
            case = generate(seed)
            write_files(case, folder)
            case.records = read_records(case, folder)
            with pytest.MonkeyPatch.context() as inner:
                score_by_detectron2(case, folder, inner)
            out.append(case)
    return out


def scores(case: Case, **options) -> tuple[float, float, float]:
    result = voc_ap.evaluate_voc(case.found, case.records, case.names, case.year, **options)
    return result.ap, result.ap50, result.ap75


def same(given, wanted) -> bool:
    return np.array_equal(np.array(given), np.array(wanted), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_equal_to_the_last_bit(cases, kind):
    chosen = [case for case in cases if case.kind == kind]
    wrong = [number for number, case in enumerate(chosen) if not same(scores(case), case.expected)]
    assert len(chosen) == NUM_CASES // len(KINDS) and wrong == []


def test_curves_are_equal_to_the_last_bit(cases):
    num_curves = 0
    for case in cases:
        matches = voc_ap.match_classes(case.found, case.records, len(case.names))
        for name, own in zip(case.names, matches, strict=True):
            for threshold in voc_ap.IOU_THRESHOLDS:
                with np.errstate(all="ignore"):
                    recall, precision = voc_ap.precision_recall(own, threshold)
                    ap = voc_ap.average_precision(recall, precision, case.year)
                wanted = case.curves[name, threshold]
                if len(own.scores) == 0:
                    # A class without detections is one empty line there, which reads as no curve.
                    assert wanted[2] == ap == 0 or np.isnan(wanted[2])
                    continue
                assert same(recall, wanted[0]) and same(precision, wanted[1])
                assert same(ap, wanted[2])
                num_curves += 1
    assert num_curves > 10 * NUM_CASES


def test_the_cases_hold_what_they_should(cases):
    assert {case.year for case in cases} == {2007, 2012}
    assert any(not case.found for case in cases)
    assert any(np.isnan(case.expected[0]) for case in cases)  # 2012 with an absent class
    assert any(voc_ap.evaluate_voc({}, c.records, c.names, c.year).absent_classes for c in cases)
    assert any(o[1] for case in cases for image in case.objects.values() for o in image)
    assert any(isinstance(o[2], float) for case in cases for i in case.objects.values() for o in i)
    assert (
        len({round(case.expected[0], 6) for case in cases if case.expected[0] > 0}) > NUM_CASES / 4
    )
    overlaps = [
        matches.overlap
        for case in cases
        if case.kind == "at the threshold"
        for matches in voc_ap.match_classes(case.found, case.records, len(case.names))
    ]
    assert np.isin(np.concatenate(overlaps), voc_ap.IOU_THRESHOLDS).sum() > NUM_CASES / 50


def test_a_result_set_like_vocs(tmp_path):
    """20 classes, 150 images of 30 detections: at three decimals nearly every score is tied."""
    found = write_voc_set(tmp_path / "voc", 150, 30.0)
    spec = DatasetSpec("x", str(tmp_path / "voc"), "test", VOC_CLASSES, 2007)
    records, _ = load_records(spec)
    for year in (2007, 2012):
        case = Case("ties", year, VOC_CLASSES, list(found), {}, found, records, (), {})
        with pytest.MonkeyPatch.context() as patch:
            score_by_detectron2(case, tmp_path / "voc", patch)
        assert case.expected[0] > 30 and same(scores(case), case.expected)


def test_detectron2_itself_refuses_float_coordinates(tmp_path):
    candidates = (generate(seed) for seed in range(KINDS.index("float"), 100, len(KINDS)))
    case = next(case for case in candidates if any(case.objects.values()))
    write_files(case, tmp_path)
    case.kind = "plain"  # so that nothing is changed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="invalid literal"):
        score_by_detectron2(case, tmp_path, patch)


def num_different(cases: list[Case], **options) -> int:
    defined = [case for case in cases if not np.isnan(case.expected[0])]
    return sum(not same(scores(case, **options), case.expected) for case in defined)


def test_control_sides_without_the_added_pixel(cases, monkeypatch):
    monkeypatch.setattr(voc_ap, "PIXEL", 0.0)
    assert num_different(cases[:NUM_CONTROLS]) > 50


def test_control_an_overlap_equal_to_the_threshold_counts(cases, monkeypatch):
    lower = tuple(np.nextafter(threshold, 0) for threshold in voc_ap.IOU_THRESHOLDS)
    monkeypatch.setattr(voc_ap, "IOU_THRESHOLDS", lower)  # > the next lower number is >=
    assert num_different([case for case in cases if case.kind == "at the threshold"]) > 0


def test_control_scores_and_boxes_that_are_not_rounded(cases):
    assert num_different(cases[:NUM_CONTROLS], round_detections=False) > 10


def test_control_ties_in_another_order(cases):
    chosen = [case for case in cases if case.kind == "ties"]
    for case in chosen:
        case.found = {i: tuple(a[::-1] for a in f) for i, f in reversed(case.found.items())}
    try:
        assert num_different(chosen) > 0
    finally:
        for case in chosen:
            case.found = {i: tuple(a[::-1] for a in f) for i, f in reversed(case.found.items())}


def test_control_difficult_objects_that_count(cases):
    def easier(case: Case) -> list[dict]:
        return [
            {**r, "annotations": [{**a, "difficult": 0} for a in r["annotations"]]}
            for r in case.records
        ]

    changed = 0
    for case in cases[:NUM_CONTROLS]:
        result = voc_ap.evaluate_voc(case.found, easier(case), case.names, case.year)
        changed += not same((result.ap, result.ap50, result.ap75), case.expected)
    assert changed > 30
