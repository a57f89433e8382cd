"""Running a fine-tuned detector on images of one's own: boxes drawn, and a file of them.

What is needed lies in the trial's folder (config.yaml, classes.json, model_final.pth), so the
data it was trained on may be gone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detection.class_names import classes_differ
from detection.config import load_detection_config
from detection.data import voc
from detection.data.data_check import CheckReport, ImageHeader, image_header
from detection.data.datasets import DetectionData
from detection.data.transforms import decoding_of
from detection.engines.base import FINAL_MODEL, Engine, Run
from detection.pictures import draw_detections
from detection.run_folder import CLASSES_FILE, CONFIG_FILE, read_class_names
from detection.weights_file import read_weights_file
from moco.cfgnode import CfgNode
from moco.data.rgb import Decoding
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, ConfigError, DataError
from moco.training.checkpoint import manifest_path, verify_manifest, write_json_atomic

DETECTIONS_FILE = "detections.json"
CLIPPED = (
    "16-bit grey, read as Detectron2 reads it: clipped at 255, so nearly all white; --engine "
    "embedded scales it where the model was trained so"
)
PICTURES_FOLDER = "pictures"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")


@dataclass(frozen=True)
class Model:
    """A fine-tuned model.

    Attributes:
        cfg: its configuration; MODEL.WEIGHTS is `weights`.
        trained_by: the name of the engine, where it is known.
        names_itself: whether the file, or what lies beside it, tells the class names; else the
            configuration does.
    """

    weights: Path
    cfg: CfgNode
    class_names: tuple[str, ...]
    trained_by: str | None
    names_itself: bool = True


def find_model(source: str | os.PathLike, config_file: str | os.PathLike | None = None) -> Model:
    """The model of a trial's folder, or of a weights file.

    Args:
        config_file: its configuration; None takes config.yaml beside the weights.
    Raises:
        ConfigError: no configuration, or class names that are unknown or of another number.
        CheckpointError: no finished model there, or one that its manifest contradicts.
    """
    source = Path(source).expanduser()
    weights = source / FINAL_MODEL if source.is_dir() else source
    if not weights.is_file():
        raise CheckpointError(f"{weights}: does not exist; {_what_to_give(source)}")
    trained_by = None
    if manifest_path(weights).is_file():
        trained_by = verify_manifest(weights).get("engine")
    beside = weights.parent / CONFIG_FILE
    if config_file is None and not beside.is_file():
        raise ConfigError(
            f"{weights}: has no {CONFIG_FILE} beside it; give its configuration with --config-file"
        )
    path = str(beside if config_file is None else config_file)
    cfg = load_detection_config(path, ["MODEL.WEIGHTS", str(weights)])
    names, names_itself = _class_names(weights, cfg, path)
    return Model(weights, cfg, names, trained_by, names_itself)


def _what_to_give(source: Path) -> str:
    if source.is_dir():
        trials = sorted(path.parent.name for path in source.glob(f"trial_*/{FINAL_MODEL}"))
        if trials:
            return f"the folder holds trials, give one of them, e.g. {source / trials[0]}"
        return "give the folder of a trial whose training is finished"
    return f"give a trial's folder, or a model's file such as {FINAL_MODEL}"


def _class_names(weights: Path, cfg: CfgNode, config_file: str) -> tuple[tuple[str, ...], bool]:
    """(names, whether they are the weights' own)"""
    own, beside = read_weights_file(weights).class_names, read_class_names(weights.parent)
    names, where = own or beside, f"{weights} and what lies beside it"
    configured, names_itself = _configured_names(cfg), names is not None
    if names is None:
        names, where = configured, config_file
    elif own and beside and own != beside:
        raise ConfigError(
            f"{weights}: {classes_differ(cfg, own, beside, 'the files beside it')}; restore "
            f"{CLASSES_FILE} there"
        )
    elif configured and len(configured) == len(names) and configured != names:
        raise ConfigError(f"{weights}: {classes_differ(cfg, names, configured, config_file)}")
    if names is None:
        raise ConfigError(
            f"{weights}: its class names are unknown: there is no {CLASSES_FILE} beside it, and "
            f"{config_file} names no VOC data; write {CLASSES_FILE} there, "
            '{"class_names": ["...", ...]}, in the order of training'
        )
    if len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ConfigError(
            f"{where}: {len(names)} class names, MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}; give the configuration of this model"
        )
    return names, names_itself


def _configured_names(cfg: CfgNode) -> tuple[str, ...] | None:
    """The class names that a configuration of VOC data tells; COCO's are in its data."""
    if cfg.DATASETS.VOC_ROOT:
        return tuple(cfg.DATASETS.VOC_CLASSES)
    of_voc = cfg.DATASETS.TEST and all(name in voc.NAMED for name in cfg.DATASETS.TEST)
    return voc.VOC_CLASSES if of_voc else None


def find_images(
    sources: Sequence[str | os.PathLike], output_dir: Path, left_out: Counter | None = None
) -> list[Path]:
    """The files named, and all images in the folders named and below, in order, each once.

    Nothing under `output_dir` is taken, which may lie in such a folder. A named file is kept
    whatever it is, so that it is reported later if it is no image.

    Args:
        left_out: counts the other files of folders by their suffix.
    Raises: DataError if there is none.
    """
    own = output_dir.resolve()
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        below = _images_below(source, own, left_out) if source.is_dir() else [source]
        found.update(dict.fromkeys(below))
    if not found:
        raise DataError(
            f"{', '.join(map(str, sources))}: no image is there; allowed suffixes in a folder: "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    return list(found)


def _images_below(folder: Path, own: Path, left_out: Counter | None) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(n for n in folders if (Path(parent) / n).resolve() != own)
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield Path(parent) / name
            elif left_out is not None:
                left_out[os.path.splitext(name)[1].lower() or name] += 1


def picture_paths(images: Sequence[Path], folder: Path) -> list[Path]:
    """Where each image's picture goes: its name in `folder`, numbered where names repeat.

    JPEG images give .jpg, all others .png.
    Raises: ConfigError if a picture would replace one of the images.
    """
    inputs = {path.resolve() for path in images}
    taken: set[str] = set()
    paths = []
    for image in images:
        suffix = ".jpg" if image.suffix.lower() in (".jpg", ".jpeg") else ".png"
        name, number = f"{image.stem}{suffix}", 1
        while name.lower() in taken:
            number += 1
            name = f"{image.stem}_{number}{suffix}"
        taken.add(name.lower())
        paths.append(folder / name)
        if paths[-1].resolve() in inputs:
            raise ConfigError(
                f"--output-dir: the picture {paths[-1]} would replace an image; give another folder"
            )
    return paths


def predict_images(
    model: Model,
    engine: Engine,
    process: ProcessInfo,
    images: Sequence[Path],
    output_dir: Path,
    *,
    threshold: float,
) -> Iterator[dict]:
    """Detect on each image and draw it; when all are done, write detections.json.

    Args:
        threshold: detections of a lower score are left out, of pictures and file.
    Yields: for each image its entry in detections.json: "file", then "error" if it could not be
        read, else "width", "height", "picture", "boxes" [x0, y0, x1, y1] in pixels from 0,
        "scores", "classes" (names), of a model with a mask head "masks" (COCO RLE), and perhaps
        "warning".
    Raises: CheckpointError for weights that do not fit; ConfigError if nothing can be written.
    """
    pictures = picture_paths(images, output_dir / PICTURES_FOLDER)
    try:
        (output_dir / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output-dir {output_dir}: cannot be written to ({error.strerror}); give another"
        ) from error
    detect = engine.detector(_run(model, process, output_dir))
    decoding = decoding_of(model.cfg, engine.name)
    entries = []
    for image, picture in zip(images, pictures, strict=True):
        try:
            entry = _detect_one(detect, image, picture, model.class_names, threshold, decoding)
            entry["picture"] = picture.relative_to(output_dir).as_posix()
        except DataError as error:
            entry = {"file": str(image), "error": str(error)}
        entries.append(entry)
        yield entry
    content = {
        "model": str(model.weights),
        "engine": engine.name,
        "versions": engine.versions(),
        "class_names": list(model.class_names),
        "threshold": threshold,
        "images": [entry for entry in entries if "error" not in entry],
        "failed": [entry for entry in entries if "error" in entry],
    }
    write_json_atomic(output_dir / DETECTIONS_FILE, content)


def _run(model: Model, process: ProcessInfo, output_dir: Path) -> Run:
    no_data = DetectionData(
        train_records=[],
        test_records=[],
        class_names=model.class_names,
        metric_year=2007,
        test_name="images",
        report=CheckReport(),
    )
    return Run(
        cfg=model.cfg,
        data=no_data,
        output_dir=output_dir,
        seed=0,
        process=process,
        config_digest="",
        eval_only=True,
        progress=False,
    )


def _detect_one(
    detect: Callable[[dict], tuple],
    image: Path,
    picture: Path,
    class_names: Sequence[str],
    threshold: float,
    decoding: Decoding,
) -> dict:
    header = _header(image, decoding)
    width, height = header.width, header.height
    record = {"file_name": str(image), "image_id": str(image), "height": height, "width": width}
    boxes, scores, classes, *masks = detect(record)
    draw_detections(
        record, boxes, scores, classes, class_names, picture, threshold,
        masks[0] if masks else None, decoding,
    )
    kept = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= threshold]
    entry = {
        "file": str(image),
        "width": width,
        "height": height,
        "boxes": [[_short(x) for x in boxes[i]] for i in kept],
        "scores": [_short(scores[i]) for i in kept],
        "classes": [class_names[int(classes[i])] for i in kept],
    }
    if header.is_sixteen_bit and decoding.sixteen_bit_range is None:
        entry["warning"] = CLIPPED
    if masks:
        rles = [masks[0][i] for i in kept]
        entry["masks"] = [{"size": list(m["size"]), "counts": _text(m["counts"])} for m in rles]
    return entry


def _header(image: Path, decoding: Decoding) -> ImageHeader:
    """Its size as `read_image` turns it. Raises: DataError."""
    try:
        return image_header(image, decoding)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(
            f"{image}: this image cannot be read ({' '.join(str(reason).split())})"
        ) from error


def _short(value: np.floating) -> float:
    return float(str(np.float32(value)))  # the shortest number that is this float32


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
