"""Splits for annotated images that have none: found, read, drawn at random, written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detection.data.account import counted
from detection.data.data_check import CheckReport, raise_for_problems
from detection.data.transforms import read_image
from detection.data.voc_check import composed, index_annotations, index_images, parse_annotation
from moco.errors import ConfigError, DataError
from moco.seeding import python_random
from moco.training.checkpoint import write_text_atomic

SPLITS = ("trainval", "test")


@dataclass(frozen=True)
class Pair:
    """An image and its annotation."""

    image: Path
    annotation: Path


@dataclass(frozen=True)
class Found:
    """What a folder holds: `pairs` by image id, and how many files have no counterpart."""

    folder: Path
    is_flat: bool
    pairs: dict[str, Pair]
    lone_images: tuple[str, ...]
    lone_annotations: tuple[str, ...]

    def line(self) -> str:
        reasons = [
            f"{counted(len(names), noun)} ({', '.join(names[:3])}{' ...' * (len(names) > 3)})"
            for names, noun in (
                (self.lone_images, "image without an annotation"),
                (self.lone_annotations, "annotation without an image"),
            )
            if names
        ]
        left_out = f"; left out: {', '.join(reasons)}" if reasons else ""
        return f"{self.folder}: {counted(len(self.pairs), 'annotated image')}{left_out}"


@dataclass(frozen=True)
class Content:
    """What the images and annotations hold.

    Attributes:
        pixels: image id -> SHA-256 of its pixels.
        objects: image id -> class name -> number of its objects.
        class_names: sorted.
    """

    pixels: dict[str, str]
    objects: dict[str, Counter]
    class_names: tuple[str, ...]

    def lines(self, split: Mapping[str, Sequence[str]]) -> list[str]:
        """How many images and objects of each class the parts of a split have."""
        lines = []
        for name, ids in split.items():
            total: Counter = sum((self.objects[image_id] for image_id in ids), Counter())
            listed = ", ".join(f"{total[name]} {name}" for name in self.class_names)
            lines.append(f"{name}: {counted(len(ids), 'image')}; objects: {listed}")
            absent = [class_name for class_name in self.class_names if not total[class_name]]
            if absent:
                lines.append(
                    f"warning: {name} has no object of {', '.join(absent)}; another --seed or "
                    "--test-fraction may give it one"
                )
        copies = len(self.pixels) - len(set(self.pixels.values()))
        if copies:
            lines.append(
                f"{counted(copies, 'image')} with the pixels of another: each is on its side"
            )
        return lines


def find_pairs(folder: Path) -> Found:
    """The annotated images of a flat folder, or of Annotations and JPEGImages in it.

    Raises: DataError where there is none, or the folder has another layout.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; give one of images and their .xml files")
    two = [folder / "JPEGImages", folder / "Annotations"]
    is_flat = not all(part.is_dir() for part in two)
    images = index_images(folder if is_flat else two[0])
    annotations = index_annotations(folder if is_flat else two[1])
    by_form = {composed(stem): path for stem, path in images.items()}
    pairs, lone = {}, []
    for stem, annotation in annotations.items():
        image = images.get(stem) or by_form.get(composed(stem))
        if image is None:
            lone.append(annotation.name)
        else:
            pairs[stem] = Pair(image, annotation)
    if not pairs:
        raise DataError(
            f"{folder}: holds no image beside an .xml file of the same name ({len(images)} images, "
            f"{len(annotations)} .xml); allowed: both in one folder, or JPEGImages/ and "
            "Annotations/ in it"
        )
    used = {pair.image for pair in pairs.values()}
    lone_images = tuple(path.name for path in images.values() if path not in used)
    return Found(folder, is_flat, dict(sorted(pairs.items())), lone_images, tuple(lone))


def read_pairs(pairs: Mapping[str, Pair]) -> Content:
    """Decode every image and read every annotation.

    Raises: DataError that names the first of those that cannot be read.
    """
    report = CheckReport()
    pixels, objects = {}, {}
    for image_id, pair in pairs.items():
        root = parse_annotation(pair.annotation, report)
        if root is None:
            continue
        names = [(e.findtext("name") or "").strip() for e in root.findall("object")]
        if "" in names:
            report.problem(pair.annotation, "object", "has no <name>", "allowed: a class's name")
        objects[image_id] = Counter(names)
        try:
            image = read_image(pair.image, "RGB")
        except DataError as error:
            report.problems.append(str(error))
            continue
        sha = hashlib.sha256(repr(image.shape).encode())
        sha.update(image.tobytes())
        pixels[image_id] = sha.hexdigest()
    raise_for_problems(report)
    class_names = tuple(sorted(set().union(*objects.values())))
    if not class_names:
        raise DataError("none of the annotations has an object; give annotated images")
    return Content(pixels, objects, class_names)


def draw_split(content: Content, test_fraction: float, seed: int) -> dict[str, list[str]]:
    """Split name -> sorted image ids; images of equal pixels are on one side.

    Groups are drawn until the test part has its share of the images, at least one; the training
    part keeps at least one group.

    Raises: DataError for fewer than two different images.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for image_id, digest in content.pixels.items():
        groups[digest].append(image_id)
    order = sorted(groups.values())
    if len(order) < 2:
        raise DataError("at least two different images are needed for a training and a test part")
    python_random(seed, "voc-split").shuffle(order)
    wanted = max(1, round(test_fraction * len(content.pixels)))
    test: list[str] = []
    while len(test) < wanted and len(order) > 1:
        test += order.pop()
    train = [image_id for group in order for image_id in group]
    return dict(zip(SPLITS, (sorted(train), sorted(test)), strict=True))


def write_splits(root: Path, split: Mapping[str, Sequence[str]], *, overwrite: bool) -> None:
    """Write ImageSets/Main/<split>.txt. Raises: ConfigError for one that exists."""
    folder = root / "ImageSets" / "Main"
    paths = {name: folder / f"{name}.txt" for name in split}
    present = [str(path) for path in paths.values() if os.path.lexists(path)]
    if present and not overwrite:
        raise ConfigError(
            f"{', '.join(present)}: exists; nothing is overwritten: use it, remove it, or add "
            "--overwrite"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, ids in split.items():
            write_text_atomic(paths[name], "".join(f"{image_id}\n" for image_id in ids))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from error


def link_into(root: Path, pairs: Mapping[str, Pair], finish: Callable[[Path], None]) -> None:
    """Make `root`, which must not exist, a VOC-format folder of the pairs: hard links, or copies
    where the disk has none. It appears when it is whole, after `finish` was called on it.

    Raises: ConfigError, DataError.
    """
    if os.path.lexists(root):
        raise ConfigError(f"{root}: exists; nothing is overwritten: give a folder that does not")
    partial = root.with_name(f"{root.name}.partial")
    try:
        for name in ("Annotations", "JPEGImages"):
            (partial / name).mkdir(parents=True)
        for image_id, pair in pairs.items():
            _link(pair.annotation, partial / "Annotations" / f"{image_id}.xml")
            _link(pair.image, partial / "JPEGImages" / f"{image_id}{pair.image.suffix}")
        finish(partial)
        os.rename(partial, root)
    except FileExistsError as error:
        raise ConfigError(f"{partial}: exists; remove it if no other run makes it") from error
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(f"{root}: cannot be made ({error.strerror})") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
