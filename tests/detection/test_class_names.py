"""The classes of a model's file: where their names are from, and what is said of them."""

import pytest
import torch
from quick_trials import CLASSES, PROCESS, QuickEngine, make_data

from detection import trials
from detection.class_names import check_classes, classes_differ, classes_of_weights
from detection.config import load_detection_config
from detection.predict import find_model
from detection.run_folder import write_class_names
from moco.cfgnode import dump_yaml
from moco.errors import CheckpointError, ConfigError


def write(path, count=2, **content):
    model = {"roi_heads.box_predictor.cls_score.weight": torch.zeros(count + 1, 4)}
    torch.save({"model": model, **content}, path)
    return str(path)


def config(*overrides, weights="", names=CLASSES):
    keys = ["DATASETS.VOC_ROOT", "x", "DATASETS.VOC_CLASSES", str(tuple(names))]
    keys += ["MODEL.ROI_HEADS.NUM_CLASSES", str(len(names)), "MODEL.WEIGHTS", str(weights)]
    return load_detection_config(None, [*keys, *overrides])


def write_config(path, cfg):
    path.write_text(dump_yaml(cfg))
    return path


def test_names_are_the_files_then_those_beside_it(tmp_path):
    named = write(tmp_path / "a.pth", class_names=["a", "b"])
    bare = write(tmp_path / "b.pth")
    assert classes_of_weights(named).names == ("a", "b")
    assert classes_of_weights(bare).names is None
    write_class_names(tmp_path, ["c", "d"])
    assert classes_of_weights(named).names == ("a", "b")
    assert classes_of_weights(bare).names == ("c", "d")
    # Names of another number of classes are of another model.
    assert classes_of_weights(write(tmp_path / "c.pth", count=3)).names is None


def test_a_backbone_and_random_weights_have_no_classes(tmp_path):
    torch.save({"model": {"res5.0.conv1.weight": torch.zeros(1)}}, tmp_path / "w.pth")
    for weights in ("", str(tmp_path / "w.pth")):
        assert classes_of_weights(weights) is None
        assert check_classes(config(weights=weights), CLASSES, eval_only=False) is None


def test_names_that_are_no_list_of_names_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'class_names' is not a list of names"):
        classes_of_weights(write(tmp_path / "a.pth", class_names={"a": 1}))


def test_unknown_names_are_said(tmp_path):
    cfg = config(weights=write(tmp_path / "a.pth"))
    for eval_only in (True, False):
        line = check_classes(cfg, CLASSES, eval_only=eval_only)
        assert line.endswith(
            "a.pth does not name its 2 classes; they are taken for (circle, square), in this order"
        )


def test_unknown_names_are_in_the_log(tmp_path, capsys):
    root = make_data(tmp_path / "data")
    weights = write(tmp_path / "a.pth")
    keys = ("DATASETS.VOC_ROOT", str(root), "DATASETS.TRAIN", "('train',)")
    keys += ("DATASETS.TEST", "('test',)", "OUTPUT_DIR", str(tmp_path / "out"))
    trials.prepare(config(*keys, weights=weights), QuickEngine(), "", PROCESS, eval_only=True)
    assert "a.pth does not name its 2 classes" in capsys.readouterr().out


def test_fine_tuning_may_start_anew_and_evaluation_may_not(tmp_path):
    weights = write(tmp_path / "a.pth", class_names=list(CLASSES[::-1]))
    with pytest.raises(ConfigError, match="or set MODEL.RESET_PREDICTORS True"):
        check_classes(config(weights=weights), CLASSES, eval_only=False)
    anew = config("MODEL.RESET_PREDICTORS", "True", weights=weights)
    assert check_classes(anew, CLASSES, eval_only=False) is None
    with pytest.raises(ConfigError, match="another order") as error:
        check_classes(anew, CLASSES, eval_only=True)
    assert "RESET_PREDICTORS" not in str(error.value)
    three = config(weights=weights, names=("a", "b", "c"))
    assert check_classes(three, ("a", "b", "c"), eval_only=False) is None  # reset by itself


def test_the_first_difference_of_long_lists_is_named():
    long = [f"class{n}" for n in range(80)]
    other = [*long[:40], "another", *long[41:]]
    text = classes_differ(config(), long, other)
    assert "(class 40 is 'class40' there and 'another' here)" in text and "and 55 more" in text


def test_predict_takes_the_files_names_and_refuses_others(tmp_path):
    """A model's file that was copied away from its folder knows its classes."""
    weights = write(tmp_path / "alone.pth", class_names=list(CLASSES))
    path = tmp_path / "coco.yaml"
    path.write_text(dump_yaml(config("DATASETS.VOC_ROOT", "", "DATASETS.TRAIN", "('x',)")))
    assert find_model(weights, path).class_names == CLASSES
    bare = find_model(write(tmp_path / "bare.pth"), write_config(path, config()))
    assert bare.class_names == CLASSES and not bare.names_itself
    assert find_model(weights, path).names_itself
    path.write_text(dump_yaml(config(names=CLASSES[::-1])))
    with pytest.raises(ConfigError, match=r"those of .*coco.yaml are \(square, circle\), in anoth"):
        find_model(weights, path)
    path.write_text(dump_yaml(config()))
    write_class_names(tmp_path, CLASSES[::-1])
    with pytest.raises(ConfigError, match="those of the files beside it are .*; restore classes"):
        find_model(weights, path)
