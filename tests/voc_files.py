"""A VOC-format folder of two images, with whatever is wrong in one of them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from detection.config import get_defaults
from detection.data.voc import DatasetSpec, load_records

CLASSES = ("cat", "dog")
SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"
TAGS = "<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"


def box(xmin=11, ymin=6, xmax=30, ymax=25, name="cat", tags=TAGS) -> str:
    corners = {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}
    inside = "".join(f"<{k}>{v}</{k}>" for k, v in corners.items() if v is not None)
    return f"<object><name>{name}</name>{tags}<bndbox>{inside}</bndbox></object>"


def make_voc(root: Path, objects="", *, size=SIZE, xml=None, split="a\n", suffix=".jpg") -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_text(split)
    (root / "ImageSets/Main/test.txt").write_text("b\n")
    for image_id, content in (("a", objects or box()), ("b", box(name="dog"))):
        Image.new("RGB", (60, 40), (90, 120, 40)).save(root / f"JPEGImages/{image_id}{suffix}")
        text = f"<annotation>{size if image_id == 'a' else SIZE}{content}</annotation>"
        (root / f"Annotations/{image_id}.xml").write_text(text)
    if xml is not None:
        (root / "Annotations/a.xml").write_text(xml)
    return root


def load(root: Path, split="train"):
    return load_records(DatasetSpec("toy", str(root), split, CLASSES, 2007))


def make_cfg(root: Path):
    cfg = get_defaults()
    cfg.DATASETS.VOC_ROOT, cfg.DATASETS.VOC_CLASSES = str(root), CLASSES
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("test",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    return cfg
