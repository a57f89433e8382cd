"""Parts of an image source: chosen images, a share of the labels, the images of a list file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moco.data.images import ImageSource
from moco.errors import ConfigError, DataError
from moco.seeding import torch_generator


class SubsetSource:
    """The images `indices` of another source, in that order, as a source of their own."""

    def __init__(self, source: ImageSource, indices: Sequence[int]):
        self.source = source
        self.indices = tuple(int(index) for index in indices)
        self.root = source.root
        self.paths = tuple(source.paths[index] for index in self.indices)
        self.labels = None
        if source.labels is not None:
            self.labels = tuple(source.labels[index] for index in self.indices)
        self.class_names = source.class_names
        self.decoding = source.decoding

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def content_hashes(self) -> np.ndarray | None:
        hashes = self.source.content_hashes
        return None if hashes is None else hashes[list(self.indices)]

    def path(self, index: int) -> str:
        return self.source.path(self.indices[index])

    def note_path(self, index: int) -> str:
        """The name of the image that `note_image` was given: by the number in the whole source."""
        return self.source.note_path(index)

    def read_bytes(self, index: int) -> bytes:
        return self.source.read_bytes(self.indices[index])

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.indices[index])


def stratified_indices(labels: Sequence[int], fraction: float, seed: int) -> list[int]:
    """A share of the images of every class, sorted: a pure function of its arguments.

    Of a class with n images round(fraction * n) are taken, halves up and at least one. With one
    seed a smaller fraction's images are among a larger one's.

    Raises: ConfigError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"fraction of the labels is {fraction}; allowed: above 0, up to 1 (0.01 for 1 %)"
        )
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen = []
    for label, own in members.items():
        order = torch.randperm(len(own), generator=torch_generator(seed, "label-subset", label))
        count = max(1, int(fraction * len(own) + 0.5))
        chosen += [own[position] for position in order[:count].tolist()]
    return sorted(chosen)


def indices_from_list(source: ImageSource, list_file: str) -> list[int]:
    """The images that a text file names, one a line, in the order of the file.

    A line begins with the image's path below the source's folder, or with its file name where only
    one image has it; what follows a space (a label, in some lists) is not read. So the published
    lists of 1 % and 10 % of ImageNet (google-research/simclr, imagenet_subsets) are read as they
    are. Empty lines are skipped.

    Raises: DataError for a file that is missing or empty, and for names that are unknown, shared by
        several images or repeated, with the first of them.
    """
    try:
        lines = Path(list_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{list_file}: cannot be read ({reason}); give a list of images") from error
    by_path = {path: index for index, path in enumerate(source.paths)}
    by_name: dict[str, list[int]] = {}
    for index, path in enumerate(source.paths):
        by_name.setdefault(path.rpartition("/")[2], []).append(index)
    chosen: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            continue
        if name not in by_path and name not in by_name:
            name = name.split()[0]
        found = [by_path[name]] if name in by_path else by_name.get(name, [])
        where = f"{list_file}: line {number}: {name!r}"
        if len(found) != 1:
            problem = "names no image" if not found else f"names {len(found)} images"
            raise DataError(
                f"{where} {problem} of {source.root}; give paths below that folder, or file names "
                "that occur once"
            )
        if found[0] in chosen:
            raise DataError(f"{where} was named in line {chosen[found[0]]} already; name it once")
        chosen[found[0]] = number
    if not chosen:
        raise DataError(f"{list_file}: names no image; give one a line")
    return list(chosen)
