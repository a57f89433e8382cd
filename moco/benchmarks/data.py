"""Image pairs a second of recipe v2: this project's backends beside the reference's transforms.

First in one process with one thread, files to batches: what one core does. Each has a process of
its own; those of this project are set up as its loader's workers (`spare_overhead`). The
reference's views are normalised float32; this project's are uint8, normalised in the training
step, so its row "opencv, normalised" adds that. The backend "device" leaves everything after the
crops to the device: its row is the CPU's part. Then through loaders with worker processes.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import PIL
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from moco.benchmarks import data_recipes
from moco.benchmarks.own_process import own_processes
from moco.benchmarks.pictures import natural_jpeg
from moco.benchmarks.record import alternate, compare, write_results
from moco.data.augment import build_recipe, normalize
from moco.data.decode import plain_jpeg_size, read_bgr
from moco.data.images import ImageSource, find_images
from moco.data.loader import build_pretrain_loader, spare_overhead
from moco.data.two_views import TwoViews
from moco.errors import ConfigError

REFERENCE, DECODE = "reference", "decode only"
DEVICE = "device: decode, two crops"
_SEED = 0
_WARM_UP_BATCHES = 3  # a worker, besides those it has prefetched
_PREFETCHED = 2  # a worker


@dataclass(frozen=True)
class Options:
    """num_images: of the folder, or to generate; batch and loader_batches: of the loaders."""

    num_images: int = 64
    size: int = 224
    num_rounds: int = 9
    workers: tuple[int, ...] = (1, 2)
    batch: int = 16
    loader_batches: int = 4

    def check(self) -> None:
        if self.num_images < self.batch or self.num_rounds < 3 or min(self.workers, default=1) < 1:
            raise ConfigError(
                f"--images {self.num_images} --rounds {self.num_rounds} --batch {self.batch} "
                f"--workers {' '.join(map(str, self.workers))}: allowed are as many images as a "
                "batch has, 3 rounds and 1 worker, each or more"
            )


def run(options: Options, *, folder: str | None, output: Path) -> None:
    """Measure, print both tables and write JSON.

    Args:
        folder: of images; None generates JPEG files of 500 x 400 pixels.
    Raises: ConfigError for options out of range, DataError for a folder without enough images.
    """
    options.check()
    with _images(options.num_images, folder) as source:
        content = {
            "options": asdict(options),
            "images": _describe(source, options.num_images, folder),
            "one process, one thread": one_process(source, options),
        }
        print(f"\n**one process, one thread**, {content['images']}\n")
        print(_table(content["one process, one thread"]))
        for num_workers in options.workers:
            name = f"loader, {num_workers} worker" + "s" * (num_workers > 1)
            content[name] = loaders(source, options, num_workers)
            print(f"\n**{name}**\n\n{_table(content[name])}")
    write_results(output, content, _versions())
    print(f"\nwritten: {output}")


def one_process(source: ImageSource, options: Options) -> dict[str, dict]:
    """For each way its pairs a second, speed-up over the reference and share of decoding alone."""
    indices, recipe = range(options.num_images), build_recipe("v2", size=options.size)
    batches = [indices[i : i + options.batch] for i in range(0, len(indices), options.batch)]

    def of_files(two_views: data_recipes.TwoViewsOf) -> Callable[[int], None]:
        def job(_: int) -> None:
            for batch in batches:
                default_collate([two_views(source.read_bytes(index)) for index in batch])

        return job

    def of_backend(backend: str, then: Callable | None = None) -> Callable[[int], None]:
        views = TwoViews(source, recipe, _SEED, backend)

        def job(number: int) -> None:
            for batch in batches:
                view_q, view_k, *_ = views.batch([(number, index) for index in batch])
                if then is not None:
                    then(view_q), then(view_k)

        return job

    def decode(_: int) -> None:
        for index in indices:
            read_bgr(source, index)

    jobs = {
        REFERENCE: (of_files(data_recipes.reference(options.size)), _one_thread),
        "torchvision v2 on tensors": (
            of_files(data_recipes.torchvision_v2(options.size)),
            _one_thread,
        ),
        "pil": (of_backend("pil"), spare_overhead),
        "opencv": (of_backend("opencv"), spare_overhead),
        "opencv, normalised": (of_backend("opencv", normalize), spare_overhead),
        DEVICE: (of_backend("device"), spare_overhead),
        DECODE: (decode, spare_overhead),
    }
    lightly = data_recipes.lightly(options.size)
    if lightly is None:
        print("lightly is left out: it cannot be imported")
    else:
        jobs["lightly"] = of_files(lightly), _one_thread
    with own_processes(jobs) as calls:
        for call in calls.values():
            call(-1)
        seconds = alternate(calls, options.num_rounds)
    return _rates(seconds, options.num_images)


def _one_thread() -> None:
    torch.set_num_threads(1)


def loaders(source: ImageSource, options: Options, num_workers: int) -> dict[str, dict]:
    """As `one_process`, for whole loaders, each kept busy in turn."""
    recipe = build_recipe("v2", size=options.size)

    def ours(backend: str) -> Iterator:
        return iter(
            build_pretrain_loader(
                source, recipe, seed=_SEED, global_batch=options.batch, rank=0, world_size=1,
                first_step=0, last_step=1_000_000, num_workers=num_workers, pin_memory=False,
                backend=backend,
            )
        )  # fmt: skip

    files = _Files(source, options, data_recipes.reference(options.size))
    batches = {
        REFERENCE: iter(DataLoader(files, options.batch, num_workers=num_workers)),
        "pil": ours("pil"),
        "opencv": ours("opencv"),
        DEVICE: ours("device"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    names = list(batches)
    for number in range(options.num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_drain(batches[name], num_workers, options.loader_batches))
    return _rates(seconds, options.batch * options.loader_batches * num_workers)


def _drain(batches: Iterator, num_workers: int, count: int) -> float:
    """Seconds of `count` batches a worker; those that waited for the turn are not timed."""
    for _ in range((_PREFETCHED + _WARM_UP_BATCHES) * num_workers):
        next(batches)
    started = time.perf_counter()
    for _ in range(count * num_workers):
        next(batches)
    seconds = time.perf_counter() - started
    # The workers still fill their queues, which shall not disturb the next loader's turn.
    time.sleep(1.5 * _PREFETCHED * seconds / count)
    return seconds


class _Files(Dataset):
    """The images again and again, each as two views of another's recipe."""

    def __init__(self, source: ImageSource, options: Options, two_views: data_recipes.TwoViewsOf):
        self.source, self.num_images, self.two_views = source, options.num_images, two_views

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, position: int) -> list[torch.Tensor]:
        return self.two_views(self.source.read_bytes(position % self.num_images))


def _rates(seconds: dict[str, list[float]], num_pairs: int) -> dict[str, dict]:
    rates = compare(seconds, REFERENCE)
    shares = compare(seconds, DECODE) if DECODE in seconds else {}
    for name, row in rates.items():
        row["pairs_per_s"] = round(num_pairs / row["median_s"], 1)
        if shares:
            row["share_of_decoding"] = shares[name]["speedup"]
            row["share_quartiles"] = shares[name]["speedup_quartiles"]
    return rates


def _table(rates: dict[str, dict]) -> str:
    lines = ["| | pairs/s | times the reference | quartiles | share of decode only | quartiles |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rates.items():
        low, high = row["speedup_quartiles"]
        share = " | "
        if "share_of_decoding" in row:
            least, most = row["share_quartiles"]
            share = f"{row['share_of_decoding']:.2f} | {least:.2f} to {most:.2f}"
        lines.append(
            f"| {name} | {row['pairs_per_s']:.1f} | {row['speedup']:.2f} | {low:.2f} to {high:.2f} "
            f"| {share} |"
        )
    return "\n".join(lines)


@contextmanager
def _images(num_images: int, folder: str | None) -> Iterator[ImageSource]:
    if folder is not None:
        source = find_images(folder)
        if len(source) < num_images:
            raise ConfigError(
                f"{folder}: holds {len(source)} images, --images asks for {num_images}; lower it"
            )
        yield source
        return
    with tempfile.TemporaryDirectory() as generated:
        for number in range(num_images):
            (Path(generated) / f"{number:05d}.jpg").write_bytes(natural_jpeg(number))
        yield find_images(generated)


def _describe(source: ImageSource, num_images: int, folder: str | None) -> dict[str, object]:
    files = [source.read_bytes(index) for index in range(num_images)]
    sizes = [plain_jpeg_size(file) for file in files]
    pixels = [
        size[0] * size[1] if size else read_bgr(source, index).size // 3
        for index, size in enumerate(sizes)
    ]
    return {
        "kind": "generated" if folder is None else "a folder",
        "number": num_images,
        "mean_pixels": round(sum(pixels) / num_images),
        "mean_bytes": round(sum(map(len, files)) / num_images),
    }


def _versions() -> dict[str, str]:
    versions = {"opencv": cv2.__version__, "pillow": PIL.__version__}
    try:
        versions["lightly"] = importlib.metadata.version("lightly")
    except importlib.metadata.PackageNotFoundError:
        pass
    return versions
