"""A COCO-format annotation file as exporters write it, made plain."""

from __future__ import annotations

import codecs
import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from detection.data.data_check import CheckReport
from moco.errors import DataError

WHOLE_FLOAT = "whole number written as a float, such as 640.0: read as a whole number"
LARGEST_ID = 2**63 - 1
_LARGEST_EXACT_FLOAT = 2**53
_WHOLE_FIELDS = {
    "images": ("id", "height", "width"),
    "categories": ("id",),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
}


def load_json(path: Path) -> dict:
    """The content of a COCO JSON file. Raises: DataError, in one line."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: file: {error.strerror}; allowed: a COCO JSON file") from error
    except (ValueError, RecursionError, MemoryError) as error:
        reason = {RecursionError: "nested too deep", MemoryError: "larger than the memory"}.get(
            type(error), " ".join(str(error).split())
        )
        raise DataError(
            f"{path}: file: not readable as JSON ({reason}); allowed: a COCO JSON file"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: file: holds a {type(content).__name__}; allowed: an object with images, "
            "annotations and categories"
        )
    return content


def make_whole(path: Path, content: dict, report: CheckReport) -> None:
    """Write whole-valued floats of ids and sizes, which some exporters give, as whole numbers."""
    for section, fields in _WHOLE_FIELDS.items():
        entries = content.get(section)
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            for name in fields if isinstance(entry, dict) else ():
                value = entry.get(name)
                if type(value) is float and value.is_integer():
                    if abs(value) <= _LARGEST_EXACT_FLOAT:
                        entry[name] = int(value)
                        report.repaired(WHOLE_FLOAT, f"{path}: {section}[{number}].{name}")


def root_categories(content: dict) -> dict[int, str]:
    """Id -> name of the categories that no annotation uses and that are another's supercategory.

    Roboflow's exports begin with one, named as the project; it is no class.
    """
    categories = [c for c in _dicts(content, "categories") if is_id(c.get("id"))]
    used = {a.get("category_id") for a in _dicts(content, "annotations") if _has_category(a)}
    return {
        category["id"]: category["name"]
        for category in categories
        if category["id"] not in used
        and isinstance(category.get("name"), str)
        and any(
            other.get("supercategory") == category.get("name") and other is not category
            for other in categories
        )
    }


def _dicts(content: dict, section: str) -> list[dict]:
    entries = content.get(section)
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _has_category(annotation: dict) -> bool:
    return is_id(annotation.get("category_id"))


def scored_content(path: Path, category_ids: Collection[int] | None) -> tuple[dict, bool]:
    """What of a checked annotation file pycocotools is given, and whether it differs from the file.

    Numbers are whole; other categories than these and annotations of images that the file does not
    list are left out.

    Raises: DataError, KeyError, TypeError for a file that was changed since.
    """
    content, report = load_json(path), CheckReport()
    make_whole(path, content, report)
    with open(path, "rb") as file:
        changed = file.read(3) == codecs.BOM_UTF8 or bool(report.repairs)
    images = {image["id"] for image in content["images"]}
    for section, field, known in (
        ("categories", "id", category_ids),
        ("annotations", "image_id", images),
    ):
        if known is None:
            continue
        kept = [entry for entry in content[section] if entry[field] in known]
        changed |= len(kept) < len(content[section])
        content[section] = kept
    return content, changed


@contextlib.contextmanager
def scored_file(path: Path, category_ids: Collection[int]) -> Iterator[str]:
    """A file that pycocotools can read by itself: the one given, or `scored_content` of it."""
    content, changed = scored_content(path, category_ids)
    if not changed:
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name
        plain.write_text(json.dumps(content), encoding="utf-8")
        yield str(plain)


def is_id(value: object) -> bool:
    """Whether it is a whole number that pycocotools can hold."""
    return type(value) is int and abs(value) <= LARGEST_ID
