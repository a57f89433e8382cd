"""The labelled training and test images of a data set's folder."""

from __future__ import annotations

from pathlib import Path

from moco.data.images import ImageSource, find_images, left_out_in_words
from moco.data.rgb import DEFAULT_DECODING, Decoding
from moco.data.subset import SubsetSource
from moco.errors import DataError

TEST_FOLDERS = ("val", "test")
_SHOWN = 5  # differing classes, in a message


def find_test_folder(data_dir: str) -> Path | None:
    """`val` or `test` in `data_dir`, the first that exists."""
    return next((Path(data_dir) / f for f in TEST_FOLDERS if (Path(data_dir) / f).is_dir()), None)


def find_splits(
    data_dir: str, test_dir: str | None = None, decoding: Decoding = DEFAULT_DECODING
) -> tuple[ImageSource, ImageSource]:
    """Training and test images of `data_dir`, both in class folders of the same names.

    Args:
        data_dir: holds `train/CLASS/*` and `val/CLASS/*` or `test/CLASS/*`.
        test_dir: another folder of test images.
        decoding: how files become pixels: as for the weights' pretraining.
    Raises: DataError where a split or its labels are missing, or the classes differ.
    """
    folder = Path(test_dir) if test_dir else find_test_folder(data_dir)
    if folder is None:
        raise DataError(
            f"{data_dir}: has no folder {' or '.join(TEST_FOLDERS)}; give a folder with train/ and "
            "one of these, or name the test images' folder with --test-data"
        )
    train, test = find_images(data_dir, decoding), find_images(folder, decoding)
    for source in (train, test):
        if source.labels is None:
            raise DataError(
                f"{source.root}: is a flat folder of images; evaluation needs class folders, whose "
                "names are the labels"
            )
    check_same_classes(train, test, "give both the same class folders")
    return train, test


def splits_in_words(
    whole: ImageSource, train: ImageSource | SubsetSource, test: ImageSource
) -> str:
    """How many images and classes two splits have, and what is left out of their folders.

    Args:
        whole: the training images, of which `train` are used.
    """
    part = "" if len(train) == len(whole) else f" of {len(whole)}"
    parts = [
        f"{len(train)}{part} training and {len(test)} test images, {len(whole.class_names)} classes"
    ]
    for name, source in (("training", whole), ("test", test)):
        words = left_out_in_words(source)
        if words:
            parts.append(words.replace("left out:", f"left out of the {name} images:"))
    return "".join(parts)


def check_same_classes(train: ImageSource, test: ImageSource, remedy: str) -> None:
    """Raises: DataError where the two splits have different classes."""
    differing = class_differences(train, test)
    if differing:
        raise DataError(
            f"{test.root}: its class folders differ from those of {train.root} ({differing}); "
            f"{remedy}"
        )


def class_differences(train: ImageSource, test: ImageSource) -> str:
    """Which classes one split has and the other has not, in words; empty where they are equal."""
    name = Path(test.root).name
    parts = []
    for what, names in (
        (f"missing in {name}", set(train.class_names) - set(test.class_names)),
        (f"only in {name}", set(test.class_names) - set(train.class_names)),
    ):
        if names:
            more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
            parts.append(f"{what}: {', '.join(sorted(names)[:_SHOWN])}{more}")
    return "; ".join(parts)
