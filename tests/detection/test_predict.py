"""Running a fine-tuned model on images of one's own, from a trial's folder alone."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scripts import load_tool

from detection.config import load_detection_config
from detection.engines.base import Run
from detection.engines.embedded.engine import EmbeddedEngine
from detection.engines.embedded.faster_rcnn import build_model
from detection.predict import Model, find_images, find_model, picture_paths, predict_images
from detection.run_folder import write_class_names
from moco.cfgnode import dump_yaml
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, ConfigError, DataError
from moco.training.checkpoint import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
command_line = load_tool("predict")
PROCESS = ProcessInfo(0, 1, 0, torch.device("cpu"))
NAMES = ("cat", "dog", "bird")
OVERRIDES = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "INPUT.MIN_SIZE_TEST": 61,
    "DATASETS.VOC_ROOT": "/nowhere/data",  # what it was trained on is gone
    "DATASETS.VOC_CLASSES": NAMES,
    "DATASETS.TRAIN": ("train",),
    "DATASETS.TEST": ("test",),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trial's folder with a model that finds every class everywhere, with scores below 0.5."""
    folder = tmp_path_factory.mktemp("runs") / "trial_0"
    cfg = load_detection_config(None, [str(w) for pair in OVERRIDES.items() for w in pair])
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rpn_head" in name or "box_predictor" in name:
                parameter.zero_()
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([0.5, 0.2, -0.2, 0.0]))
    content = {"model": model.state_dict(), "iteration": 1}
    save_checkpoint(folder / "model_final.pth", content, engine="embedded")
    (folder / "config.yaml").write_text(dump_yaml(cfg))
    write_class_names(folder, NAMES)
    return folder


@pytest.fixture
def images(tmp_path):
    """folder/{a.jpg, b.png, sub/a.png}, of 70 x 45 pixels."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "sub/a.png"):
        Image.fromarray(rng.integers(0, 256, (45, 70, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def call(*words):
    with pytest.raises(SystemExit) as exit_:
        command_line.main([*map(str, words), "--device", "cpu"])
    return exit_.value.code


def test_folder_by_the_command_line(trained, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(trained, images, "--output-dir", out, "--threshold", "0.2") == 0
    content = json.loads((out / "detections.json").read_text())
    assert content["engine"] == "embedded" and content["class_names"] == list(NAMES)
    assert content["threshold"] == 0.2 and content["failed"] == []
    files = [entry["file"] for entry in content["images"]]
    assert files == [str(images / name) for name in ("a.jpg", "b.png", "sub/a.png")]
    pictures = [entry["picture"] for entry in content["images"]]
    assert pictures == ["pictures/a.jpg", "pictures/b.png", "pictures/a.png"]
    num_objects = 0
    for entry in content["images"]:
        expected = boxes_of(trained, entry["file"], threshold=0.2)
        assert {key: entry[key] for key in expected} == expected  # float32 survives the text
        assert set(entry["classes"]) == {"cat", "dog"}  # 0.38 and 0.28; a bird has 0.19
        assert (entry["width"], entry["height"]) == (70, 45)
        assert Image.open(out / entry["picture"]).width == 70 * 9  # enlarged, to be legible
        num_objects += len(entry["boxes"])
    assert num_objects > 0
    printed = capsys.readouterr().out
    assert "auto: it trained the model" in printed and "3/3 images" in printed
    assert "3 image(s); left out, as no image by their names: 1 x .txt\n" in printed
    assert f"{num_objects} objects with score >= 0.2 on 3 image(s)" in printed


def boxes_of(trained, path, threshold):
    """What the engine finds, by its own contract."""
    model = find_model(trained)
    run = Run(model.cfg, None, trained, 0, PROCESS, "", eval_only=True)
    record = {"file_name": path, "image_id": 0, "height": 45, "width": 70}
    (found,) = EmbeddedEngine().predict(run, [record]).values()
    boxes, scores, classes = found
    kept = np.flatnonzero(scores >= threshold)
    assert len(kept) and (np.diff(scores) <= 0).all()
    return {
        "boxes": [[float(str(x)) for x in boxes[i]] for i in kept],
        "scores": [float(str(scores[i])) for i in kept],
        "classes": [NAMES[classes[i]] for i in kept],
    }


def test_a_high_threshold_leaves_nothing(trained, images, tmp_path):
    assert call(trained, images / "a.jpg", "--output-dir", tmp_path / "o", "--threshold", 0.9) == 0
    (entry,) = json.loads((tmp_path / "o" / "detections.json").read_text())["images"]
    assert entry["boxes"] == entry["scores"] == entry["classes"] == []


def test_bad_images_are_listed_and_the_others_done(trained, images, tmp_path, capsys):
    whole = (images / "b.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    words = (images, tmp_path / "absent.jpg", images / "notes.txt")
    assert call(trained, *words, "--output-dir", out) == 1
    content = json.loads((out / "detections.json").read_text())
    assert len(content["images"]) == 3
    failed = {entry["file"]: entry["error"] for entry in content["failed"]}
    assert list(failed) == [str(images / "cut.png"), *map(str, words[1:])]
    assert "truncated" in failed[str(images / "cut.png")]
    assert "No such file" in failed[str(tmp_path / "absent.jpg")]
    assert "cannot identify" in failed[str(images / "notes.txt")]
    captured = capsys.readouterr()
    assert captured.out.count("not read: ") == 3 and "Traceback" not in captured.err
    assert "3 of 6 image(s) could not be read" in captured.err


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"remove": "model_final.pth"}, CheckpointError, "give the folder of a trial whose"),
        ({"remove": "config.yaml"}, ConfigError, "give its configuration with --config-file"),
        ({"classes": ("cat", "dog")}, ConfigError, "2 class names, MODEL.ROI_HEADS.NUM_CLASSES"),
        ({"classes.json": "[]"}, CheckpointError, "needs a list of names"),
        ({"model_final.pth": "x"}, CheckpointError, "its manifest says"),
    ],
)
def test_a_wrong_trial_is_one_clear_error(trained, tmp_path, change, error, words):
    folder = tmp_path / "trial"
    shutil.copytree(trained, folder)
    for name, value in change.items():
        if name == "remove":
            (folder / value).unlink()
        elif name == "classes":
            write_class_names(folder, value)
        else:
            (folder / name).write_text(value)
    with pytest.raises(error, match=words) as caught:
        find_model(folder)
    assert "\n" not in str(caught.value)


def test_names_that_only_the_configuration_tells_are_said(trained, images, tmp_path, capsys):
    weights = tmp_path / "model.pth"
    shutil.copy(trained / "model_final.pth", weights)
    words = (weights, images / "a.jpg", "--config-file", trained / "config.yaml")
    assert call(*words, "--output-dir", tmp_path / "o") == 0
    assert "the configuration does, in order: cat, dog, bird" in capsys.readouterr().out


def test_the_folder_of_all_trials_is_not_one_trial(trained):
    with pytest.raises(CheckpointError, match=f"give one of them, e.g. {trained}"):
        find_model(trained.parent)


def test_class_names_from_the_result_or_the_configuration(trained, tmp_path):
    folder = tmp_path / "trial"
    shutil.copytree(trained, folder)
    (folder / "classes.json").unlink()
    assert find_model(folder).class_names == NAMES  # DATASETS.VOC_CLASSES
    (folder / "result.json").write_text(json.dumps({"per_class": {"x": {}, "y": {}, "z": {}}}))
    with pytest.raises(ConfigError, match=r"classes \(x, y, z\); those of .* are \(cat, dog, bird"):
        find_model(folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("/nowhere/data", "''"))
    assert find_model(folder).class_names == ("x", "y", "z")
    alone = tmp_path / "model.pth"
    shutil.copy(trained / "model_final.pth", alone)
    model = find_model(alone, trained / "config.yaml")
    assert model.class_names == NAMES and model.trained_by is None
    assert model.cfg.MODEL.WEIGHTS == str(alone)


def test_class_names_of_a_configuration_alone(trained, tmp_path):
    weights = tmp_path / "model.pth"
    shutil.copy(trained / "model_final.pth", weights)
    text = (trained / "config.yaml").read_text().replace("/nowhere/data", "''")
    config = tmp_path / "voc.yaml"
    config.write_text(
        text.replace("- test", "- voc_2007_test").replace("NUM_CLASSES: 3", "NUM_CLASSES: 20")
    )
    names = find_model(weights, config).class_names
    assert len(names) == 20 and names[:2] == ("aeroplane", "bicycle")
    config.write_text(text.replace("- test", "- coco_2017_val"))
    with pytest.raises(ConfigError, match="class names are unknown.*write classes.json"):
        find_model(weights, config)


def test_images_below_a_folder_without_what_was_written_there(images):
    out = images / "out"
    (out / "pictures").mkdir(parents=True)
    shutil.copy(images / "b.png", out / "pictures" / "b.png")
    found = find_images([images, images / "b.png"], out)
    assert found == [images / "a.jpg", images / "b.png", images / "sub" / "a.png"]
    (images / "empty").mkdir()
    with pytest.raises(DataError, match="no image is there; allowed suffixes"):
        find_images([images / "empty"], out)


def test_pictures_of_equal_names_are_numbered_and_replace_no_image(tmp_path):
    images = [tmp_path / name for name in ("x/a.png", "y/a.png", "y/a.bmp", "y/A.jpg", "y/a.jpeg")]
    names = [path.name for path in picture_paths(images, tmp_path / "pictures")]
    assert names == ["a.png", "a_2.png", "a_3.png", "A.jpg", "a_2.jpg"]
    with pytest.raises(ConfigError, match="would replace an image"):
        picture_paths([tmp_path / "pictures" / "a.png"], tmp_path / "pictures")


class MaskEngine:
    name = "masks"

    def versions(self):
        return {}

    def detector(self, run):
        assert run.eval_only and run.data.class_names == NAMES

        def detect(record):
            inside = np.zeros((record["height"], record["width"]), dtype=np.uint8, order="F")
            inside[10:30, 20:50] = 1
            boxes = np.array([[0, 0, 9, 9], [20, 10, 50, 30]], np.float32)
            rles = [coco_mask.encode(np.zeros_like(inside, order="F")), coco_mask.encode(inside)]
            return boxes, np.array([0.1, 0.9], np.float32), np.array([0, 2]), rles

        return detect


def test_masks_are_written_and_drawn(trained, images, tmp_path):
    model = Model(trained, find_model(trained).cfg, NAMES, None)
    Image.new("RGB", (70, 45), (200, 200, 200)).save(images / "b.png")
    (entry,) = predict_images(
        model, MaskEngine(), PROCESS, [images / "b.png"], tmp_path, threshold=0.5
    )
    assert entry["classes"] == ["bird"] and len(entry["masks"]) == 1
    (written,) = json.loads((tmp_path / "detections.json").read_text())["images"]
    inside = coco_mask.decode(written["masks"][0])
    assert inside.shape == (45, 70) and inside.sum() == 20 * 30 and inside[10, 20] == 1
    picture = np.asarray(Image.open(tmp_path / entry["picture"]))
    factor = picture.shape[1] // 70
    colours = {tuple(picture[y * factor, x * factor]) for y, x in ((20, 25), (20, 40), (40, 60))}
    assert len(colours) == 2 and (200, 200, 200) in colours  # in the mask, and outside


def test_progress_is_one_line_on_a_terminal_and_few_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, lines in ((Terminal(), 2), (io.StringIO(), 21)):
        progress = command_line.Progress(100, stream)
        for number in range(100):
            if number == 50:
                progress.interrupt("not read: x")
            progress.step()
        text = stream.getvalue()
        assert text.count("\n") == lines and "not read: x\n" in text
        assert "100/100 images" in text.splitlines()[-1] and "ETA 0:00:00" in text


def test_wrong_flags(trained, images, tmp_path, capsys):
    assert call(trained, images, "--output-dir", tmp_path, "--threshold", "1.5") == 2
    assert call(trained, images, "--output-dir", "/dev/null/x") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: --") for line in errors)


def test_auto_is_the_engine_that_trained_the_model_where_it_runs(trained, monkeypatch):
    def select(name, cfg=None, device_type="cpu"):
        if name == "detectron2":
            raise ConfigError("not here")
        return name, "chosen"

    monkeypatch.setattr(command_line, "select_engine", select)
    cfg = find_model(trained).cfg
    for trained_by, asked, chosen in (
        ("embedded", "auto", "embedded"),
        ("detectron2", "auto", "auto"),  # it cannot run: what `auto` finds
        (None, "auto", "auto"),
        ("detectron2", "embedded", "embedded"),
    ):
        model = Model(trained, cfg, NAMES, trained_by)
        assert command_line.choose_engine(asked, model, "cpu")[0] == chosen


@pytest.mark.detectron2
def test_both_engines_write_the_same_detections(trained, images, tmp_path):
    pytest.importorskip("detectron2")
    (images / "cut.png").write_bytes((images / "b.png").read_bytes()[:500])
    contents = {}
    for engine in ("embedded", "detectron2"):
        words = ("--output-dir", tmp_path / engine, "--threshold", 0.2, "--engine", engine)
        assert call(trained, images, *words) == 1
        contents[engine] = json.loads((tmp_path / engine / "detections.json").read_text())
        assert contents[engine]["engine"] == engine
    ours, theirs = contents.values()
    assert ours["images"] == theirs["images"] and len(ours["images"]) == 3
    assert [e["file"] for e in theirs["failed"]] == [e["file"] for e in ours["failed"]]


def test_16_bit_grey_is_read_as_in_training_and_detectron2s_reading_is_said(
    trained, tmp_path, capsys
):
    ramp = np.linspace(0, 65535, 45 * 70).astype(np.uint16).reshape(45, 70)
    grey, eight = tmp_path / "ramp.png", tmp_path / "same.png"
    Image.fromarray(ramp).save(grey)
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(eight)
    model = find_model(trained)

    class Detectron2sName(EmbeddedEngine):
        name = "detectron2"

    entries = {}
    for engine in (EmbeddedEngine(), Detectron2sName()):
        out = tmp_path / engine.name
        found = predict_images(model, engine, PROCESS, [grey, eight], out, threshold=0.2)
        entries[engine.name] = list(found)
    ours, same = entries["embedded"]
    assert ours["boxes"] == same["boxes"] != [] and "warning" not in ours
    shown = [np.asarray(Image.open(tmp_path / f"embedded/pictures/{name}.png"))
             for name in ("ramp", "same")]  # fmt: skip
    assert np.array_equal(*shown)
    theirs, same = entries["detectron2"]
    assert "clipped at 255" in theirs["warning"] and "warning" not in same
    clipped = np.asarray(Image.open(tmp_path / "detectron2/pictures/ramp.png"))
    assert not np.array_equal(clipped, shown[0])
