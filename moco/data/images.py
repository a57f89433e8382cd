"""Folders of images: found and labelled as torchvision's ImageFolder does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from moco.data.reading import read_file
from moco.data.rgb import DEFAULT_DECODING, Decoding, decode_rgb
from moco.data.shard_index import is_pack
from moco.data.shards import ShardSource, open_pack
from moco.data.workers import note_image
from moco.errors import DataError

# torchvision's IMG_EXTENSIONS (torchvision/datasets/folder.py).
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SPLITS_BESIDE_TRAIN = {"val", "valid", "validation", "test"}


@dataclass(frozen=True)
class ImageSource:
    """The images of one folder, in a fixed order.

    Attributes:
        root: the folder the paths are relative to.
        paths: one relative path ("/" separated) an image.
        labels: the class of each image as an index into `class_names`; None in a flat folder.
        class_names: the class folders, sorted; empty in a flat folder.
        decoding: how files become pixels.
        left_out: kind -> how many files and folders there are that are no image by their name.
    """

    root: str
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]
    decoding: Decoding = field(default=DEFAULT_DECODING, kw_only=True)
    left_out: dict[str, int] = field(default_factory=dict, compare=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def content_hashes(self) -> None:
        """Only packs know them, see `ShardSource`."""
        return None

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def note_path(self, index: int) -> str:
        """The name of the image that `note_image` was given."""
        return self.path(index)

    def read_bytes(self, index: int) -> bytes:
        """The file of image `index`. Raises DataError where it is unreadable."""
        note_image(index)
        return read_file(self.path(index))

    def open(self, index: int) -> Image.Image:
        """Image `index` as `decode_rgb` returns it. Raises DataError where it is unreadable."""
        return decode_rgb(self.read_bytes(index), self.path(index), self.decoding)

    def decoded_as(self, decoding: Decoding) -> ImageSource:
        """The same images, decoded otherwise."""
        return replace(self, decoding=decoding)


def find_images(
    root: str | os.PathLike, decoding: Decoding = DEFAULT_DECODING
) -> ImageSource | ShardSource:
    """List the images of a folder; none of them is opened.

    A folder that tools/pack_images.py wrote gives the images, names and labels of the folder it was
    made from, in the same order. Otherwise two layouts are read. Class folders:
    `root/CLASS/**/*.jpg`, labelled by the sorted class names, in the order of torchvision's
    ImageFolder. Flat: `root/*.jpg`, sorted, without labels.
    As the reference does (main_moco.py), `root/train` is read where `root` itself holds no image
    and has a folder `train`. To tell that split from a class named "train", it must be the only
    folder or stand beside val, valid, validation or test.
    Names that begin with a dot are left out, as are files without an image's suffix; both are
    counted. Links to folders are followed. A folder that is named as an image and holds no image
    and no folder counts as one: as one that cannot be read.

    Raises:
        DataError: root is missing, not a folder, unreadable, holds no image, mixes the two
            layouts, or a class folder holds no image; a pack is damaged.
    """
    root = Path(root).expanduser()
    if is_pack(root):
        return open_pack(root).decoded_as(decoding)
    left_out: Counter[str] = Counter()
    images, folders = _list_folder(root, left_out)
    if not images and _train_is_a_split(folders):
        root = root / "train"
        if is_pack(root):
            return open_pack(root).decoded_as(decoding)
        left_out.clear()
        images, folders = _list_folder(root, left_out)
    if images:
        mixed = next((f for f in folders if next(_images_under(root / f), None)), None)
        if mixed is not None:
            raise DataError(
                f"{root}: holds images ({images[0]}, ...) beside the image folder {mixed!r}; "
                "either class folders or a flat folder of images is allowed; move one of them away"
            )
        source = ImageSource(str(root), tuple(images), None, ())
    else:
        source = _read_class_folders(root, folders, left_out)
    return replace(source, decoding=decoding, left_out=dict(left_out))


def left_out_in_words(source: ImageSource | ShardSource) -> str:
    """What of a folder is not among the images of a source, to follow their number; or ""."""
    kinds = getattr(source, "left_out", {})
    listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    return f"; left out: {listed}" if listed else ""


def list_images(folder: str | os.PathLike) -> list[str]:
    """The images in and below a folder, by their paths relative to it, sorted by folder and name.

    Raises: DataError where it cannot be listed.
    """
    return list(_images_under(folder))


def split_folders(root: str | os.PathLike) -> list[str]:
    """The splits of a folder (train, and val, test ... beside it); none where it has no splits."""
    images, folders = _list_folder(Path(root).expanduser())
    if images or not _train_is_a_split(folders):
        return []
    return [name for name in folders if name in ("train", *_SPLITS_BESIDE_TRAIN)]


def _read_class_folders(root: Path, folders: list[str], left_out: Counter[str]) -> ImageSource:
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, folder in enumerate(folders):
        found = [f"{folder}/{path}" for path in _images_under(root / folder, left_out)]
        if not found:
            empty.append(folder)
        paths += found
        labels += [label] * len(found)
    if not paths:
        shards = "; its .tar files need an index: tools/pack_images.py --index-only"
        raise DataError(
            f"{root}: holds no image, neither directly nor in class folders; allowed suffixes: "
            f"{', '.join(IMAGE_SUFFIXES)}; give a folder of images"
            + (shards if next(root.glob("*.tar"), None) else "")
        )
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(
            f"{root}: {len(empty)} of {len(folders)} class folders hold no image ({shown}); "
            f"allowed suffixes: {', '.join(IMAGE_SUFFIXES)}; remove these folders, or give the "
            "folder that holds the classes"
        )
    return ImageSource(str(root), tuple(paths), tuple(labels), tuple(folders))


def _train_is_a_split(folders: list[str]) -> bool:
    return "train" in folders and (
        len(folders) == 1 or not _SPLITS_BESIDE_TRAIN.isdisjoint(folders)
    )


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _count_left_out(name: str, left_out: Counter[str] | None, what: str = "file") -> None:
    """Count the name of what is no image."""
    if left_out is None:
        return
    if name.startswith("."):
        left_out[f"{what} whose name begins with a dot"] += 1
    else:
        suffix = os.path.splitext(name)[1].lower()
        left_out[f"{suffix} file" if suffix else "file without a suffix"] += 1


def _list_folder(
    folder: Path, left_out: Counter[str] | None = None
) -> tuple[list[str], list[str]]:
    """The sorted names of the images and of the folders directly in `folder`."""
    images, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    folders.append(entry.name)
                elif _is_image_name(entry.name):
                    images.append(entry.name)
                else:
                    _count_left_out(entry.name, left_out)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: does not exist; give a folder of images") from error
    except NotADirectoryError as error:
        raise DataError(f"{folder}: is not a folder; give a folder of images") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    unreadable = set(_folders_as_images(folder, folders))
    for name in (f for f in folders if f.startswith(".")):
        _count_left_out(name, left_out, "folder")
    folders = [f for f in folders if f not in unreadable and not f.startswith(".")]
    return sorted([*images, *unreadable]), sorted(folders)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _folders_as_images(folder: str | os.PathLike, subfolders: list[str]) -> list[str]:
    """The folders named as an image, "x.jpg", that hold neither images nor folders."""
    found = []
    for name in filter(_is_image_name, subfolders):
        with suppress(OSError), os.scandir(os.path.join(folder, name)) as entries:
            if not any(_is_image_name(entry.name) or _is_folder(entry) for entry in entries):
                found.append(name)
    return found


def _images_under(
    top: str | os.PathLike, left_out: Counter[str] | None = None
) -> Iterator[str]:
    """Paths of the images below `top`, relative to it, in torchvision's ImageFolder's order."""

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    visited = []
    above = {os.path.dirname(top): frozenset()}  # the real folders a walked folder lies in
    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=stop):
        real = os.path.realpath(folder)
        outer = above[os.path.dirname(folder)]
        if real in outer:
            raise DataError(f"{folder}: a link leads back to a folder above it; remove the link")
        above[folder] = outer | {real}
        for name in (name for name in subfolders if name.startswith(".")):
            _count_left_out(name, left_out, "folder")
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visited.append((folder, names + _folders_as_images(folder, subfolders)))
    for folder, names in sorted(visited):
        relative = os.path.relpath(folder, top).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        for name in sorted(names):
            if _is_image_name(name):
                yield f"{prefix}{name}"
            else:
                _count_left_out(name, left_out)
