"""The check of COCO-format files: what is read, what is counted, and what stops a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from coco_files import IMAGE, RLE, SQUARE, annotation, content, load, make
from PIL import Image
from pycocotools import mask as coco_mask

from detection.config import get_defaults
from detection.data.coco import BUILTIN, CocoSpec, known_specs, load_records
from detection.data.coco_check import (
    CLIPPED_BOX,
    DUPLICATE_ID,
    EMPTY_BOX,
    NO_AREA,
    NO_CROWD_FLAG,
    NO_POLYGON,
    ZERO_ID,
    runs_of_compressed,
)
from detection.data.loader import Augmentation, load_train_sample
from detection.data.shapes_coco import make_coco_shapes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

def test_records_have_detectron2s_form(tmp_path):
    loaded = load(tmp_path, content(annotation(), annotation(2, category_id=12, iscrowd=1)))
    assert (loaded.class_names, loaded.category_ids) == (("cat", "dog"), (3, 12))
    first, second = loaded.records
    assert [r["image_id"] for r in loaded.records] == [7, 9]
    assert first == {
        "file_name": str(tmp_path / "a.jpg"),
        "image_id": 7,
        "height": 40,
        "width": 60,
        "annotations": [
            {
                "bbox": [10.0, 5.5, 30.0, 25.75],
                "bbox_mode": 0,
                "category_id": index,
                "iscrowd": index,
                "segmentation": SQUARE,
            }
            for index in (0, 1)
        ],
    }
    assert second["annotations"] == []
    # Whole numbers would be cut to whole numbers when Detectron2 resizes them.
    assert {type(v) for a in first["annotations"] for v in a["segmentation"][0]} == {float}
    assert (loaded.report.problems, dict(loaded.report.repairs)) == ([], {})
    assert (loaded.report.num_images, loaded.report.num_boxes) == (2, 2)


def test_boxes_are_summed_in_float32_as_in_detectron2(tmp_path):
    loaded = load(tmp_path, content(annotation(bbox=[0.1, 5, 20.7, 20])))
    (x0, y0, x1, y1) = loaded.records[0]["annotations"][0]["bbox"]
    assert x0 == float(np.float32(0.1)) and (y0, y1) == (5.0, 25.0)
    assert x1 == float(np.float32(0.1) + np.float32(20.7)) != 0.1 + 20.7


@pytest.mark.parametrize(
    ("entry", "kind", "num_kept"),
    [
        (annotation(bbox=[-2, 5, 20, 60]), CLIPPED_BOX, 1),
        (annotation(bbox=[10, 5, 0, 9]), EMPTY_BOX, 1),
        (annotation(bbox=[70, 5, 5, 9]), EMPTY_BOX, 1),
        (annotation(iscrowd=None), NO_CROWD_FLAG, 1),
        (annotation(area=None), NO_AREA, 1),
        (annotation(0), ZERO_ID, 1),
        (annotation(segmentation=[[1, 2, 3, 4]]), NO_POLYGON, 0),
        (annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), NO_POLYGON, 0),
    ],
)
def test_harmless_defects_are_counted(tmp_path, entry, kind, num_kept):
    loaded = load(tmp_path, content(entry, annotation(5)), for_scoring=True)
    assert loaded.report.problems == []
    assert dict(loaded.report.repairs) == {kind: 1}
    assert "annotations[0]" in loaded.report.first_seen[kind]
    kept = loaded.records[0]["annotations"]
    assert len(kept) == num_kept + 1
    assert ("iscrowd" in kept[0]) == (kind != NO_CROWD_FLAG)


def test_only_the_test_set_needs_what_scoring_needs(tmp_path):
    tree = content(annotation(0, area=None, segmentation=None))
    assert not load(tmp_path, tree).report.repairs
    assert not load(tmp_path, tree, with_masks=True).report.problems  # `check_masks` sees to it
    scored = load(tmp_path, tree, for_scoring=True, with_masks=True).report
    assert "segmentation: missing; MODEL.MASK_ON" in scored.problems[0]
    tree = content(annotation(segmentation=[[1, 2, 3, 4]]))
    scored = load(tmp_path, tree, for_scoring=True, with_masks=True).report
    assert "no polygon with 3 corners" in scored.problems[0]


def test_a_few_bad_polygons_are_left_out_of_an_object(tmp_path):
    segmentation = [[1, 2, 3, 4], *SQUARE, [], [1, 2, 3, 4, 5, 6, 7]]
    loaded = load(tmp_path, content(annotation(segmentation=segmentation)))
    assert loaded.records[0]["annotations"][0]["segmentation"] == SQUARE


def test_no_segmentation_is_no_field(tmp_path):
    for empty in (None, [], {}):
        loaded = load(tmp_path, content(annotation(segmentation=empty)))
        assert "segmentation" not in loaded.records[0]["annotations"][0]


def test_rles_are_kept_and_compressed(tmp_path):
    packed = coco_mask.frPyObjects(RLE, 40, 60)
    text = {"size": [40, 60], "counts": packed["counts"].decode()}
    loaded = load(
        tmp_path, content(annotation(segmentation=RLE), annotation(2, segmentation=text))
    )
    first, second = loaded.records[0]["annotations"]
    assert first["segmentation"] == packed and second["segmentation"] == text


def test_runs_of_compressed_counts_equal_the_mask():
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = rng.integers(1, 90, 2)
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        mask[: height // 2] = mask[0, 0]  # some long runs
        flat = mask.T.reshape(-1)
        changes = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *changes, flat.size])
        expected = [0, *runs] if flat[0] else list(runs)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        assert runs_of_compressed(counts).tolist() == expected
    for broken in ("", "\x01", "P", "o" * 9, "ü", counts + "P"):
        assert runs_of_compressed(broken) is None


def without(tree: dict, field: str) -> dict:
    return {key: value for key, value in tree.items() if key != field}


CAT = {"id": 3, "name": "cat"}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (content(annotation(category_id=4)), ("annotations[0]: category_id: 4", "categories")),
        (content(annotation(category_id=None)), ("category_id: missing",)),
        (content(annotation(image_id=8)), ("annotations: none of 1 is of an image that the file",)),
        (content(annotation(image_id=[7])), ("image_id: [7]",)),
        (content(annotation(1), annotation(1)), ("annotations[1]: id: 1", "one annotation an id")),
        (content(annotation(None)), ("annotations[0]: id: None", "whole number")),
        (content(annotation(True)), ("id: True",)),
        (content(annotation(bbox=None)), ("bbox: missing", "[x, y, width, height]")),
        (content(annotation(bbox=[1, 2, 3])), ("bbox: [1, 2, 3]",)),
        (content(annotation(bbox=[])), ("bbox: []",)),
        (content(annotation(bbox=[float("nan"), 1, 2, 3])), ("bbox: [nan, 1, 2, 3]", "finite")),
        (content(annotation(bbox=[1, 2, float("inf"), 3])), ("bbox: [1, 2, inf, 3]", "finite")),
        (content(annotation(bbox=[1, 2, 10**400, 3])), ("bbox: [1, 2, 1000", "finite")),
        (content(annotation(bbox=[1, 2, 1e200, 3])), ("up to 1e+06",)),
        (content(annotation(bbox=["1", 2, 3, 4])), ("bbox: ['1', 2, 3, 4]",)),
        (content(annotation(bbox=[1, 2, -3, 4])), ("bbox: [1, 2, -3, 4]", "0 or more")),
        (content(annotation(iscrowd=2)), ("iscrowd: 2", "0 or 1")),
        (content(annotation(ignore=1)), ("ignore: 1",)),
        (content(annotation(area=float("nan"))), ("area: nan",)),
        (content(annotation(area="big")), ("area: 'big'",)),
        (content(annotation(segmentation="x")), ("segmentation: a str",)),
        (content(annotation(segmentation=[1, 2])), ("no list of numbers",)),
        (content(annotation(segmentation=[[1, 2, None, 4, 5, 6]])), ("no list of numbers",)),
        (content(annotation(segmentation=[[1, 2, 3, 4, 5, 1e9]])), ("farther out",)),
        (content(annotation(segmentation=[[1, 2, 3, 4, 5, 10**400]])), ("not finite",)),
        (content(annotation(segmentation={**RLE, "size": [60, 40]})), ("[60, 40]", "[40, 60]")),
        (content(annotation(segmentation={**RLE, "counts": [9]})), ("40 x 60 pixels in total",)),
        (content(annotation(segmentation={**RLE, "counts": [-9, 2409]})), ("in total",)),
        (content(annotation(segmentation={**RLE, "counts": "~~"})), ("no compressed runs",)),
        (content(annotation(segmentation={**RLE, "counts": "9" * 99})), ("in total",)),
        (content(annotation(segmentation={**RLE, "counts": 5})), ("neither text nor",)),
        (content(categories=[CAT, CAT]), ("categories[1]: id: 3", "one category an id")),
        (content(categories=[CAT, {"id": 4, "name": "cat"}]), ("one category a name",)),
        (content(categories=[{"id": 3, "name": "\ud800"}]), ("a line of text",)),
        (content(categories=[{"id": 3, "name": "a\nb"}]), ("a line of text",)),
        (content(categories=[{"id": 3, "name": " "}]), ("a line of text",)),
        (content(categories=[{"id": "3", "name": "cat"}]), ("id: '3'", "whole number")),
        (content(categories=[]), ("categories: none",)),
        (content(categories=7), ("categories: a int", "a list of categories")),
        (content(categories=["cat"]), ("categories[0]: entry: a str",)),
        (content(images=[IMAGE, IMAGE]), ("images[1]: id: 7", "one image an id")),
        (content(images=[{**IMAGE, "id": "7"}]), ("images[0]: id: '7'",)),
        (content(images=[{**IMAGE, "file_name": None}]), ("file_name: None",)),
        (content(images=[{**IMAGE, "file_name": "\udc80.jpg"}]), ("a path in",)),
        (content(images=[{**IMAGE, "height": 0}]), ("height, width: (0, 60)",)),
        (content(images=[{**IMAGE, "width": 60.5}]), ("height, width: (40, 60.5)",)),
        (content(images=[{**IMAGE, "id": 1e300}]), ("images[0]: id: 1e+300",)),
        (content(images=[{**IMAGE, "width": 61}]), ("a.jpg: size: 61 x 40 in x.json", "60 x 40")),
        (content(images=[{**IMAGE, "file_name": "c.jpg"}]), ("c.jpg: image: missing",)),
        (content(images=[{**IMAGE, "file_name": "x.json"}]), ("x.json: image: does not open",)),
        (content(images=[{**IMAGE, "file_name": "a\0.jpg"}]), ("does not open",)),
        (content(images=[]), ("images: none",)),
        (without(content(), "images"), ("x.json: images: missing",)),
        (without(content(), "annotations"), ("x.json: annotations: none",)),
        (content(annotations=[]), ("annotations: none",)),
        ([], ("holds a list",)),
        ("", ("not readable as JSON",)),
        ('{"images": [', ("not readable as JSON",)),
        ("[" * 200_000, ("not readable as JSON (nested too deep)",)),
        (b'{"images": "\xff\xfe"}', ("not readable as JSON",)),
        ('{"images": ' + "9" * 5000 + "}", ("not readable as JSON",)),
    ],
)
def test_other_defects_are_problems_of_one_line(tmp_path, tree, words):
    problems = load(tmp_path, tree, for_scoring=True).report.problems
    assert len(problems) == 1 and "\n" not in problems[0]
    for word in words:
        assert word in problems[0]
    problems[0].encode()  # can be printed


def test_problems_of_one_file_are_all_listed(tmp_path):
    tree = content(annotation(1, bbox=[]), annotation(2), annotation(3, category_id=0))
    tree["images"][0]["file_name"] = "none.jpg"
    problems = load(tmp_path, tree).report.problems
    assert [p.split(": ", 2)[1].split(" ")[0] for p in problems] == [
        "annotations[0]",
        "annotations[2]",
        "image",
    ]


def test_missing_file_and_folder(tmp_path, monkeypatch):
    spec = make(tmp_path, content())
    gone = CocoSpec("toy", tmp_path / "none.json", tmp_path)
    (problem,) = load_records(gone, for_scoring=False, with_masks=False).report.problems
    assert "data set toy" in problem and "none.json: file: No such file" in problem
    gone = CocoSpec("toy", spec.json_file, tmp_path / "none")
    (problem,) = load_records(gone, for_scoring=False, with_masks=False).report.problems
    assert "none: images of toy: the folder is missing" in problem
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    gone = known_specs(get_defaults())["coco_2017_val"]
    (problem,) = load_records(gone, for_scoring=False, with_masks=False).report.problems
    assert "DETECTRON2_DATASETS" in problem and "instances_val2017.json" in problem


def test_repeated_annotation_ids_are_known_of_minival(tmp_path):
    tree = content(annotation(1), annotation(1))
    loaded = load(tmp_path, tree, name="instances_minival2014.json")
    assert not loaded.report.problems and dict(loaded.report.repairs) == {DUPLICATE_ID: 1}
    assert len(loaded.records[0]["annotations"]) == 2


def test_size_is_compared_after_exif_orientation(tmp_path):
    spec = make(tmp_path, content())
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "a.jpg", exif=exif)
    assert not load_records(spec, for_scoring=False, with_masks=False).report.problems
    Image.new("RGB", (40, 60)).save(tmp_path / "a.jpg")  # control: not turned
    assert load_records(spec, for_scoring=False, with_masks=False).report.problems


def test_generated_data_are_whole_and_deterministic(tmp_path):
    keys = dict(num_train=3, num_test=2, size=64)
    roots = [
        make_coco_shapes(tmp_path / name, **keys, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    texts = [(root / "train.json").read_text() for root in roots]
    assert texts[0] == texts[1] != texts[2]
    loaded = load_records(
        CocoSpec("a", roots[0] / "train.json", roots[0] / "images"),
        for_scoring=True,
        with_masks=True,
    )
    assert not loaded.report.problems and not loaded.report.repairs
    assert loaded.category_ids == (1, 3, 5, 7) and len(loaded.records) == 3
    for entry in json.loads(texts[0])["annotations"]:
        mask = coco_mask.decode(coco_mask.frPyObjects(entry["segmentation"], 64, 64))[:, :, 0]
        assert mask.sum() == pytest.approx(entry["area"], rel=0.2, abs=12)


@pytest.mark.detectron2
def test_names_equal_detectron2s():
    builtin = pytest.importorskip("detectron2.data.datasets.builtin")
    assert BUILTIN == builtin._PREDEFINED_SPLITS_COCO["coco"]


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
def test_records_equal_detectron2s(tmp_path):
    coco = pytest.importorskip("detectron2.data.datasets.coco")
    structures = pytest.importorskip("detectron2.structures")
    tree = content(
        annotation(1, bbox=[0.1, 5, 20.7, 20]),
        annotation(2, bbox=[1, 2, 3, 4], category_id=12, iscrowd=1, segmentation=RLE),
        annotation(3, image_id=9, segmentation=[[1, 2, 3, 4], *SQUARE]),
        annotation(4, segmentation=[[1, 2, 3, 4]]),
        annotation(5, segmentation=None, iscrowd=None, bbox=[-3.5, 50, 0, 2]),
    )
    spec = make(tmp_path, tree)
    theirs = coco.load_coco_json(str(spec.json_file), str(tmp_path), "moco_toy_coco")
    for record in theirs:
        for entry in record["annotations"]:
            corners = structures.BoxMode.convert(
                entry["bbox"], entry["bbox_mode"], structures.BoxMode.XYXY_ABS
            )
            entry["bbox"], entry["bbox_mode"] = corners, structures.BoxMode.XYXY_ABS
    mine = load_records(spec, for_scoring=False, with_masks=False).records
    assert theirs == mine and len(theirs[0]["annotations"]) == 3
    theirs[0]["annotations"][0]["bbox"][2] += 1e-6  # control
    assert theirs != mine


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
def test_training_boxes_equal_detectron2s(tmp_path):
    coco = pytest.importorskip("detectron2.data.datasets.coco")
    utils = pytest.importorskip("detectron2.data.detection_utils")
    transforms = pytest.importorskip("detectron2.data.transforms")
    rng = np.random.default_rng(0)
    boxes = rng.uniform((-9, -9, 0, 0), 45, (40, 4)).round(2).tolist()
    boxes = [*boxes, [3.5, 4, 0, 9]]  # the last one is dropped
    spec = make(tmp_path, content(*(annotation(n + 1, bbox=box) for n, box in enumerate(boxes))))
    (theirs, _) = coco.load_coco_json(str(spec.json_file), str(tmp_path), "moco_toy_coco")
    record = load_records(spec, for_scoring=False, with_masks=False).records[0]
    shape = (53, 80)  # 40 x 60 with a short side of 53
    moves = transforms.TransformList([transforms.ResizeTransform(40, 60, *shape)])
    found = [
        utils.transform_instance_annotations(entry, moves, shape)
        for entry in theirs["annotations"]
    ]
    expected = utils.filter_empty_instances(utils.annotations_to_instances(found, shape))
    augmentation = Augmentation((53,), "choice", 1333, "none", "BGR")
    sample = load_train_sample(record, augmentation, 0, 0)
    assert sample["image"].shape == (3, *shape)
    assert np.array_equal(sample["gt_boxes"], expected.gt_boxes.tensor) and len(expected) < 41
    for entry in record["annotations"]:  # control: sums in float64
        entry["bbox"][2:] = [a + b for a, b in zip(entry["bbox"], boxes.pop(0)[2:], strict=False)]
    sample = load_train_sample(record, augmentation, 0, 0)
    assert not np.array_equal(sample["gt_boxes"], expected.gt_boxes.tensor)
