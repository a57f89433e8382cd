"""One decoder for pretraining and detection: 16-bit grey, and the limit of pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from detection.config import get_defaults, load_detection_config
from detection.data.data_check import image_header
from detection.data.datasets import check_and_load
from detection.data.loader import Augmentation, load_test_sample, load_train_sample
from detection.data.shapes import make_shapes_dataset
from detection.data.transforms import decoding_of, read_image
from detection.engines.d2_session import CheckedMapper
from detection.pictures import draw_detections
from detection.run_folder import run_digest
from moco.data import rgb
from moco.data.decode import read_rgb
from moco.data.images import find_images
from moco.data.rgb import Decoding
from moco.errors import ConfigError, DataError

RAMP = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
CLASSES = ("circle", "square", "triangle", "cross")


@pytest.fixture
def pillow(monkeypatch):
    """Pillow's own limit, lowered, and put back at the end."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(rgb, "PILLOWS_LIMIT", 2000)
    return monkeypatch


def configured(*words):
    return load_detection_config(None, list(words))


@pytest.fixture
def ramp(tmp_path):
    """A folder with one 16-bit image, its file, and its record."""
    path = tmp_path / "ramp.png"
    Image.fromarray(RAMP).save(path)
    # fmt: off
    record = {"file_name": str(path), "image_id": "a", "height": 40, "width": 60,
              "annotations": [{"category_id": 0, "bbox": [1, 1, 9, 9], "bbox_mode": 0}]}
    return tmp_path, path, record


@pytest.mark.parametrize("ends", [(0, 65535), (0, 4095), (100, 700)])
def test_both_products_decode_alike(ramp, ends):
    folder, path, record = ramp
    cfg = configured("INPUT.SIXTEEN_BIT_RANGE", str(ends), "INPUT.FORMAT", "RGB",
                     "INPUT.MIN_SIZE_TRAIN", "(40,)", "INPUT.MIN_SIZE_TEST", "40",
                     "INPUT.RANDOM_FLIP", "none")  # fmt: skip
    pretrained = read_rgb(find_images(folder, Decoding(ends)), 0)
    assert len(np.unique(pretrained)) > 10
    assert np.array_equal(read_image(path, "RGB", decoding_of(cfg)), pretrained)
    for sample in (
        load_train_sample(record, Augmentation.from_config(cfg), 0, 0),
        load_test_sample(record, cfg),
    ):
        assert np.array_equal(sample["image"].permute(1, 2, 0), pretrained)


def test_negative_control_detectron2s_reading_is_white(ramp):
    cfg = configured("DATALOADER.STREAM", "detectron2", "SEED", "0")
    found = read_image(ramp[1], "RGB", decoding_of(cfg))
    assert (found == 255).mean() > 0.99
    of_engine = decoding_of(get_defaults(), "detectron2")
    assert np.array_equal(found, read_image(ramp[1], "RGB", of_engine))
    assert np.array_equal(found, np.asarray(Image.open(ramp[1]).convert("RGB")))


def test_pictures_show_what_the_detector_saw(ramp, tmp_path):
    nothing = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64))
    record = {key: ramp[2][key] for key in ("file_name", "image_id", "height", "width")}
    shown = []
    for name, ends in (("a", (0, 65535)), ("b", None)):
        path = draw_detections(record, *nothing, ("x",), tmp_path / f"{name}.png",
                               decoding=Decoding(ends))  # fmt: skip
        shown.append(np.asarray(Image.open(path).convert("L"))[:400])
    assert shown[0].std() > 50 and (shown[1] == 255).mean() > 0.9


def test_16_bits_are_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(RAMP).save(tmp_path / "x.png", exif=exif)
    found = read_image(tmp_path / "x.png", "RGB")
    assert np.array_equal(found[..., 0], np.rot90(RAMP >> 8, -1))


def test_pixels_without_a_range_are_refused_as_in_pretraining(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(DataError, match="mode 'F' have no known range"):
        read_image(tmp_path / "x.tiff", "RGB")
    assert read_image(tmp_path / "x.tiff", "RGB", Decoding(None)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("INPUT.SIXTEEN_BIT_RANGE", "(9, 9)"), "two whole numbers"),
        (("INPUT.SIXTEEN_BIT_RANGE", "(0, 4095)", "DATALOADER.STREAM", "detectron2", "SEED", "0"),
         "with DATALOADER.STREAM detectron2, which reads images as Detectron2"),
        (("INPUT.MAX_IMAGE_PIXELS", "0"), "1 or more"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        configured(*words)


def test_the_digest_of_runs_that_do_not_use_the_keys_is_that_of_before():
    plain = run_digest(get_defaults(), None, "embedded")
    assert plain == "a7bf2a4a5138ef5d"
    limit = configured("INPUT.MAX_IMAGE_PIXELS", "200000000")
    assert run_digest(limit, None, "embedded") == plain
    ranged = configured("INPUT.SIXTEEN_BIT_RANGE", "(0, 4095)")
    assert run_digest(ranged, None, "embedded") != plain


@pytest.fixture(scope="module")
def sixteen_bit_data(tmp_path_factory):
    """VOC data whose four images are 16-bit grey of 12 bits."""
    root = make_shapes_dataset(
        tmp_path_factory.mktemp("sixteen") / "v", num_train=3, num_test=1, num_unlabelled=0,
        size=64, seed=0,
    )  # fmt: skip
    for path in (root / "JPEGImages").iterdir():
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
        path.unlink()
        Image.fromarray(grey << 4).save(path.with_suffix(".png"))
    return root


def data_lines(root, *words, engine="embedded"):
    cfg = configured("DATASETS.VOC_ROOT", str(root), "DATASETS.VOC_CLASSES", repr(CLASSES),
                     "DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('test',)",
                     "MODEL.ROI_HEADS.NUM_CLASSES", "4", *words)  # fmt: skip
    return [line for line in check_and_load(cfg, engine).report.lines() if "16-bit" in line]


def test_the_check_says_how_16_bits_are_read(sixteen_bit_data):
    (line,) = data_lines(sixteen_bit_data)
    assert line.startswith("warning: 16-bit grey: 4 of 4 such images looked at, values ")
    assert "of 256 grey levels by INPUT.SIXTEEN_BIT_RANGE (0, 65535); INPUT.SIXTEEN" in line
    assert "'(0, 4095)' would give" in line
    (line,) = data_lines(sixteen_bit_data, "INPUT.SIXTEEN_BIT_RANGE", "(0, 4095)")
    assert "warning" not in line
    stream = data_lines(sixteen_bit_data, "DATALOADER.STREAM", "detectron2", "SEED", "0")
    for (line,) in (stream, data_lines(sixteen_bit_data, engine="detectron2")):
        assert line.startswith(
            "warning: 4 16-bit grey images read as Detectron2 reads them: clipped at 255, so "
            "nearly all white"
        )


def test_a_large_image_is_refused_with_pillows_reason_and_the_key(ramp, pillow):
    small = Decoding(max_pixels=2000, max_pixels_key="INPUT.MAX_IMAGE_PIXELS")
    words = (
        r"Image size \(2400 pixels\) exceeds limit of 2000 pixels, could be decompression bomb DOS "
        "attack; for a file that can be trusted raise INPUT.MAX_IMAGE_PIXELS, now 2000"
    )
    for read in (lambda: image_header(ramp[1], small), lambda: read_image(ramp[1], "RGB", small)):
        with pytest.raises(ValueError, match=words):
            read()
    large = Decoding(max_pixels=2400)
    assert image_header(ramp[1], large).width == 60
    assert read_image(ramp[1], "RGB", large).shape == (40, 60, 3)


def test_detectron2s_mapper_gets_the_limit_too(ramp, pillow):
    def mapper(record):
        with Image.open(record["file_name"]) as image:
            return image.size

    with pytest.raises(Image.DecompressionBombError):  # control
        CheckedMapper(mapper, 2000)(ramp[2])
    assert CheckedMapper(mapper, 2400)(ramp[2]) == (60, 40)
