"""Files a second from a folder and from its pack, uniformly and in blocks; nothing is decoded.

By default before each round the files leave the page cache, so the disk is measured, and what it
gave is counted (Linux). One process reads: loader workers overlap waiting, which helps all rows.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moco.benchmarks.pictures import natural_jpeg
from moco.benchmarks.record import alternate, compare, table, write_results
from moco.data.images import ImageSource, find_images
from moco.data.sampler import BlockOrder, epoch_order
from moco.data.shard_writer import PackOptions, pack_images
from moco.data.shards import ShardSource, open_pack
from moco.errors import ConfigError
from moco.seeding import torch_generator

BASELINE = "folder"
_DIFFERENT = 32  # generated pictures; the rest repeats them
_SEED = 0


@dataclass(frozen=True)
class Options:
    """num_images: to generate without --data; block_size, blocks_in_flight: of DATA.ORDER blocks;
    warm: leave the files in the page cache."""

    num_images: int = 2000
    num_rounds: int = 5
    block_size: int = 64
    blocks_in_flight: int = 8
    warm: bool = False

    def check(self) -> None:
        if self.num_images < 1 or self.num_rounds < 3:
            raise ConfigError(
                f"--images {self.num_images} --rounds {self.num_rounds}: allowed are 1 image and "
                "3 rounds, or more"
            )


def run(options: Options, *, folder: str | None, output: Path) -> dict:
    """Measure, print a table and write the JSON file. Returns: its content."""
    options.check()
    with tempfile.TemporaryDirectory(dir=output.parent if output.parent.is_dir() else None) as base:
        source = find_images(folder) if folder else _generate(Path(base) / "images", options)
        if isinstance(source, ShardSource):
            raise ConfigError(f"{folder}: is packed; give the folder of images it was made from")
        (Path(base) / "pack").mkdir()
        pack_images(source, Path(base) / "pack", PackOptions(), _storage_order(len(source)))
        os.sync()  # what is not on the disk yet cannot leave the page cache
        content = _measure(options, source, open_pack(Path(base) / "pack"))
    write_results(output, content)
    print(table(content["compared"], BASELINE))
    for name, row in content["compared"].items():
        rate, disk = row["images_per_s"], row["disk_mib"]
        print(f"{name}: {rate:.0f} images/s, {disk:.1f} MiB from the disk")
    return content


def _measure(options: Options, source: ImageSource, pack: ShardSource) -> dict:
    blocks = BlockOrder(
        torch.from_numpy(pack.storage_order), options.block_size, options.blocks_in_flight
    )
    ways = {
        BASELINE: (source, epoch_order),
        "pack": (pack, epoch_order),
        "pack, blocks": (pack, blocks),
        "pack, blocks read ahead": (pack, blocks),
    }
    files = [source.path(index) for index in range(len(source))]
    files += [os.path.join(pack.root, name) for name in pack.index.shards]
    # Of the reading alone: what `alternate` measures would hold the forgetting too.
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    from_disk: dict[str, list[int]] = {name: [] for name in ways}

    def job(name: str) -> Callable[[int], None]:
        images, order = ways[name]

        def read_all(epoch: int) -> None:
            if not options.warm:
                _forget(files)
            reader = images
            if name.endswith("read ahead"):
                reader = pack.reading_ahead(options.block_size, options.blocks_in_flight)
            numbers = order(len(images), _SEED, epoch).tolist()
            before, started = _bytes_from_disk(), time.perf_counter()
            for index in numbers:
                reader.read_bytes(index)
            seconds[name].append(time.perf_counter() - started)
            from_disk[name].append(_bytes_from_disk() - before)

        return read_all

    alternate({name: job(name) for name in ways}, options.num_rounds)
    compared = compare(seconds, BASELINE)
    for name, row in compared.items():
        row["images_per_s"] = round(len(source) / row["median_s"], 1)
        row["disk_mib"] = round(statistics.median(from_disk[name]) / 2**20, 2)
    return {
        "options": asdict(options),
        "num_images": len(source),
        "mean_bytes": int(pack.index.samples["size"].mean()),
        "compared": compared,
    }


def _generate(folder: Path, options: Options) -> ImageSource:
    folder.mkdir()
    pictures = [natural_jpeg(seed) for seed in range(min(_DIFFERENT, options.num_images))]
    for number in range(options.num_images):
        (folder / f"{number:06d}.jpg").write_bytes(pictures[number % len(pictures)])
    return find_images(folder)


def _storage_order(num_images: int) -> list[int]:
    """As tools/pack_images.py stores them."""
    return torch.randperm(num_images, generator=torch_generator(0, "pack-order")).tolist()


def _forget(paths: Sequence[str]) -> None:
    """Take files out of the page cache."""
    if not hasattr(os, "posix_fadvise"):
        raise ConfigError("this system cannot empty its page cache; give --warm")
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _bytes_from_disk() -> int:
    """What this process has had the disk read; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
