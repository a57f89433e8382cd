"""R25: a model meets data, or a configuration, whose classes are others or in another order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quick_trials import CLASSES, PROCESS, QuickEngine, draw_nothing, make_data

from detection import class_names, predict, run_folder, trials
from detection.class_names import DetectorClasses
from detection.config import load_detection_config
from detection.data.shapes_coco import make_coco_shapes
from detection.predict import find_model
from detection.run_identity import RunIdentity
from moco.cfgnode import dump_yaml
from moco.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.faults
WRONG = {"permuted": CLASSES[::-1], "others": ("circle", "cross")}
PLACES = ("evaluation", "fine-tuning", "prediction", "resuming")
SOURCES = ("in the file", "beside it")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    options = {"num_train": 2, "num_test": 2, "size": 64, "seed": 0, "class_names": CLASSES}
    return {"voc": make_data(folder / "voc"), "coco": make_coco_shapes(folder / "coco", **options)}


@pytest.fixture(autouse=True)
def without_drawing(monkeypatch):
    draw_nothing(monkeypatch)


def data_of(root: Path, form: str, names: tuple[str, str], folder: Path) -> dict:
    """The keys of the data in `root` with its classes called, and ordered, otherwise."""
    keys = {"MODEL.ROI_HEADS.NUM_CLASSES": 2, "DATASETS.TEST": "('test',)"}
    keys["DATASETS.TRAIN"] = "('train',)"
    text = "cross" if "cross" in names else "square"
    if form == "voc":
        own = folder / "voc"
        for path in root.rglob("*"):
            target = own / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".xml":
                target.write_text(path.read_text().replace("square", text))
            elif path.is_file():
                target.write_bytes(path.read_bytes())
        return keys | {"DATASETS.VOC_ROOT": own, "DATASETS.VOC_CLASSES": names}
    files = []
    for split in ("train", "test"):
        content = json.loads((root / f"{split}.json").read_text().replace("square", text))
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name
        path = folder / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        files.append((split, str(path), str(root / "images")))
    return keys | {"DATASETS.COCO_FILES": tuple(files)}


def config(keys: dict, **more):
    keys = {**keys, **{name.replace("__", "."): value for name, value in more.items()}}
    return load_detection_config(None, [str(word) for pair in keys.items() for word in pair])


def weights(folder: Path, source: str) -> Path:
    """A detector's file of the classes circle and square."""
    folder.mkdir(parents=True)
    content = {"model": {"roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 4)}}
    if source == "in the file":
        content["class_names"] = list(CLASSES)
    else:
        run_folder.write_class_names(folder, CLASSES)
    torch.save(content, folder / "model_final.pth")
    return folder / "model_final.pth"


def meet(place: str, form: str, root: Path, names: tuple[str, str], source: str, folder: Path):
    """Do what `place` says with a model of CLASSES and data of `names`. Raises what it raises."""
    keys = data_of(root, form, names, folder / "data")
    if place == "prediction":
        model = weights(folder / "run", source)
        (folder / "other.yaml").write_text(dump_yaml(config(keys)))
        return find_model(model, folder / "other.yaml")
    if place == "resuming":
        right = data_of(root, form, CLASSES, folder / "right")
        out = {"OUTPUT_DIR": folder / "out", "SOLVER__MAX_ITER": 2, "SOLVER__STEPS": ()}
        trials.run_trials(trials.prepare(config(right, **out), QuickEngine(), "", PROCESS), 1)
        if source == "beside it":
            for path in (folder / "out" / "trial_0").glob("*.manifest.json"):
                content = json.loads(path.read_text())
                del content["class_names"]
                path.write_text(json.dumps(content))
        job = trials.prepare(
            config(keys, **out), QuickEngine(), "", PROCESS, allow_change=["data"]
        )
        return trials.run_trials(job, 1)
    cfg = config(keys, MODEL__WEIGHTS=weights(folder / "run", source), OUTPUT_DIR=folder / "out")
    return trials.prepare(cfg, QuickEngine(), "", PROCESS, eval_only=place == "evaluation")


def is_refused(*args) -> bool:
    names = args[3]
    try:
        meet(*args)
    except (CheckpointError, ConfigError) as error:
        text = str(error)
        order = {
            "voc": """DATASETS.VOC_CLASSES '("circle","square")'""",
            "coco": "number the categories of the data as (circle, square)",
        }[args[1]]
        both = f"classes ({', '.join(CLASSES)}); " in text and f"({', '.join(names)})" in text
        return both and "\n" not in text and (set(names) != set(CLASSES) or order in text)
    return False


def cases(form: str):
    # A configuration of COCO data does not name classes, so prediction has nothing to compare.
    places = [place for place in PLACES if (place, form) != ("prediction", "coco")]
    return [(p, kind, source) for p in places for kind in WRONG for source in SOURCES]


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_other_classes_are_refused_with_both_lists(roots, form, tmp_path, observed):
    good = [
        is_refused(place, form, roots[form], WRONG[kind], source, tmp_path / f"{n}")
        for n, (place, kind, source) in enumerate(cases(form))
    ]
    observed("R25", sum(good), len(good))


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_the_same_classes_are_not_refused(roots, form, tmp_path, observed):
    for n, (place, source) in enumerate((p, s) for p in PLACES for s in SOURCES):
        meet(place, form, roots[form], CLASSES, source, tmp_path / f"{n}")
    observed("R25", n + 1, n + 1)


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_control_without_the_names_other_classes_are_taken(
    roots, form, tmp_path, observed, monkeypatch
):
    unknown = lambda weights: DetectorClasses(Path(weights), 2, None)  # noqa: E731
    monkeypatch.setattr(class_names, "classes_of_weights", unknown)
    monkeypatch.setattr(predict, "_configured_names", lambda cfg: None)
    check = RunIdentity.check
    monkeypatch.setattr(
        RunIdentity,
        "check",
        lambda self, path, found, allowed=(): check(
            self,
            path,
            {**found, "class_names": None, "config": None, "config_digest": self.config_digest},
            allowed,
        ),
    )
    found = cases(form)
    failed = [
        not is_refused(place, form, roots[form], WRONG[kind], source, tmp_path / f"{n}")
        for n, (place, kind, source) in enumerate(found)
    ]
    observed("R25", sum(failed), len(failed), control=True)
