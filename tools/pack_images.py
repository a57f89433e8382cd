"""Pack a folder of images into tar shards, which one disk read an image serves.

python tools/pack_images.py IMAGES OUT [--resize SHORTER_SIDE] [--shard-size-mb MB] [--workers N]
python tools/pack_images.py --index-only SHARDS
python tools/pack_images.py --verify OUT

IMAGES is what --data of tools/pretrain.py takes: class folders, a flat folder, or train/ with val/
or test/ beside it. OUT, which must not exist, then serves as --data: the same images in the same
order, so a run's numbers are the same unless --resize changes the images. OUT appears when it is
whole and has been read back; while it is written it is called OUT.partial.

--index-only writes the index for .tar files in WebDataset's layout that others made. --verify reads
a pack and compares every image's SHA-256, after it was copied, say.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moco.data.images import find_images, left_out_in_words, split_folders  # noqa: E402
from moco.data.rgb import FULL_RANGE, PILLOWS_LIMIT, Decoding  # noqa: E402
from moco.data.shard_index import is_pack  # noqa: E402
from moco.data.shard_scan import index_shards, list_shards  # noqa: E402
from moco.data.shard_writer import (  # noqa: E402
    SKIPPED_FILE,
    Packed,
    PackOptions,
    pack_images,
    verify,
)
from moco.data.shards import open_pack  # noqa: E402
from moco.errors import ConfigError, DataError, exit_on_error  # noqa: E402
from moco.signals import exit_on_signals  # noqa: E402

_QUIET_SECONDS = 60.0  # between lines when the output is not a terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?", type=Path, metavar="IMAGES")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--index-only", type=Path, metavar="SHARDS", help="folder of .tar files")
    others.add_argument("--verify", type=Path, metavar="OUT", help="a pack, or its splits")
    parser.add_argument(
        "--resize",
        type=int,
        metavar="SHORTER_SIDE",
        help="scale larger images down to this shorter side, in pixels, as JPEG; without it every "
        "file is kept as it is",
    )
    parser.add_argument("--quality", type=int, default=95, help="of resized JPEG files")
    parser.add_argument("--shard-size-mb", type=float, default=256.0, metavar="MB")
    parser.add_argument(
        "--in-order",
        action="store_true",
        help="store the images in their own order; without it they lie shuffled, so that reading "
        "in blocks (DATA.ORDER blocks) mixes classes. Their numbers are the same either way",
    )
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help=f"leave unreadable images out and list them in {SKIPPED_FILE}; otherwise they end it",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=PILLOWS_LIMIT,
        metavar="N",
        help="larger images are refused (default: Pillow's own limit); training needs "
        "DATA.MAX_IMAGE_PIXELS too",
    )
    parser.add_argument(
        "--sixteen-bit-range",
        type=int,
        nargs=2,
        default=FULL_RANGE,
        metavar=("BLACK", "WHITE"),
        help="with --resize: the values of 16-bit grey that become black and white; without it "
        "files keep their 16 bits, and DATA.SIXTEEN_BIT_RANGE scales them in training",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="0: none"
    )
    args = parser.parse_args(argv)
    alone = args.index_only is not None or args.verify is not None
    if not alone and args.out is None:
        parser.error("give IMAGES and OUT, or --index-only SHARDS, or --verify OUT")
    if alone and args.images is not None:
        parser.error("--index-only and --verify take no IMAGES and OUT")
    return args


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    _check(args)
    with exit_on_signals():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    if args.index_only is not None:
        return _index_only(args)
    if args.verify is not None:
        return _verify(args.verify.expanduser())
    source_root, out = args.images.expanduser(), args.out.expanduser()
    splits = split_folders(source_root) or ["."]
    if os.path.lexists(out):
        raise ConfigError(f"{out}: exists; nothing is overwritten: give a folder that does not")
    if out.resolve().is_relative_to(source_root.resolve()):
        raise ConfigError(f"{out}: is inside {source_root}; give a folder outside the images")
    partial = out.with_name(f"{out.name}.partial")
    _make_folder(partial)
    try:
        lines = [_pack_split(source_root / s, partial / s, out / s, args) for s in splits]
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_folder(out.parent)
    print("\n".join(lines))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, value, least, most in (
        ("--resize", args.resize, 1, 1 << 16),
        ("--quality", args.quality, 1, 100),
        ("--workers", args.workers, 0, 1024),
        ("--max-image-pixels", args.max_image_pixels, 1, 1 << 40),
        ("--shard-size-mb", args.shard_size_mb, 0.001, 1 << 20),
    ):
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} {value}: allowed is {least} to {most}")
    black, white = args.sixteen_bit_range
    if not 0 <= black < white <= FULL_RANGE[1]:
        raise ConfigError(
            f"--sixteen-bit-range {black} {white}: allowed is 0 <= BLACK < WHITE <= {FULL_RANGE[1]}"
        )
    if (black, white) != FULL_RANGE and args.resize is None:
        raise ConfigError(
            "--sixteen-bit-range: without --resize files keep their 16 bits; leave it out, and set "
            "DATA.SIXTEEN_BIT_RANGE in training"
        )


def _make_folder(partial: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(
            f"{partial}: exists; another packing is at work or was killed: remove it if none runs"
        ) from error
    except OSError as error:
        raise DataError(f"{partial}: cannot be made ({error.strerror})") from error


def _pack_split(root: Path, folder: Path, final: Path, args: argparse.Namespace) -> str:
    from moco.seeding import torch_generator  # loads torch, which no worker process needs

    source = find_images(root, _decoding(args))
    if is_pack(root):
        raise ConfigError(f"{root}: is packed already")
    order = list(range(len(source)))
    if not args.in_order:
        import torch

        order = torch.randperm(len(source), generator=torch_generator(0, "pack-order")).tolist()
    folder.mkdir(exist_ok=True)
    options = PackOptions(
        shard_bytes=int(args.shard_size_mb * 2**20),
        resize=args.resize,
        quality=args.quality,
        skip_unreadable=args.skip_unreadable,
        num_workers=args.workers,
    )
    with _Progress(f"packing {root}", len(source), "image") as progress:
        packed = pack_images(source, folder, options, order, progress.tick)
    pack = open_pack(folder)
    with _Progress(f"reading back {final}", len(pack), "image") as progress:
        verify(pack, progress.tick)
    if len(pack) + len(packed.skipped) != len(source):
        raise DataError(f"{folder}: has {len(pack)} images instead of {len(source)}")
    _flush_folder(folder)
    return _summary(final, replace(packed, num_images=len(pack)), left_out_in_words(source))


def _decoding(args: argparse.Namespace) -> Decoding:
    return Decoding(tuple(args.sixteen_bit_range), args.max_image_pixels, "--max-image-pixels")


def _index_only(args: argparse.Namespace) -> int:
    folder = args.index_only.expanduser()
    if is_pack(folder):
        raise ConfigError(f"{folder}: has an index; remove its pack.json to make another")
    with _Progress(f"indexing {folder}", len(list_shards(folder)), "shard") as progress:
        packed = index_shards(
            folder, args.workers, args.skip_unreadable, progress.tick, _decoding(args)
        )
    open_pack(folder)
    print(_summary(folder, packed))
    return 0


def _verify(root: Path) -> int:
    splits = [] if is_pack(root) else split_folders(root)
    for folder in [root / split for split in splits or ["."]]:
        if not is_pack(folder):
            raise ConfigError(f"{folder}: is no pack; give a folder that holds a pack.json")
        pack = open_pack(folder)
        with _Progress(f"reading {folder}", len(pack), "image") as progress:
            verify(pack, progress.tick)
        print(f"{folder}: {len(pack)} images, each with the SHA-256 of the index")
    return 0


def _summary(folder: Path, packed: Packed, left_out: str = "") -> str:
    lines = [
        f"{folder}: {packed.num_images} images in {packed.num_shards} shards, "
        f"{packed.num_bytes / 2**20:.1f} MiB; the SHA-256 of each is in the index{left_out}"
    ]
    if packed.skipped:
        listed = folder / SKIPPED_FILE
        lines.append(f"skipped {len(packed.skipped)} unreadable images, listed in {listed}:")
        lines += [f"  {reason}" for _, reason in packed.skipped[:20]]
        if len(packed.skipped) > 20:
            lines.append(f"  ... and {len(packed.skipped) - 20} more")
    for what, (count, first) in packed.left_out.items():
        lines.append(f"left unread: {count} {what} (first: {first})")
    return "\n".join(lines)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Progress:
    """On a terminal a tqdm bar; elsewhere a line a minute."""

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit, self.done, self.bar = what, total, unit, 0, None
        self.started = self.last_line = time.monotonic()
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, desc=what, unit=unit, file=sys.stdout, dynamic_ncols=True
            )

    def tick(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update()
        elif now - self.last_line >= _QUIET_SECONDS:
            self.last_line = now
            rate = self.done / (now - self.started)
            print(
                f"{self.what}: {self.done}/{self.total} {self.unit}s, {rate:.0f}/s, "
                f"{(self.total - self.done) / rate / 60:.0f} min left",
                flush=True,
            )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    main()
