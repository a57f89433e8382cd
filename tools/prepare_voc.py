"""Make a VOC-format folder with splits from annotated images.

python tools/prepare_voc.py FOLDER [--test-fraction 0.2] [--seed 0] [--overwrite]
python tools/prepare_voc.py FOLDER --output-dir OUT

FOLDER holds Annotations/ and JPEGImages/: ImageSets/Main/trainval.txt and test.txt are written
into it. Or it is flat, with images and their .xml files side by side: OUT, which must not exist,
becomes a VOC-format folder of the same files, hard-linked where the disk allows it. The split is
random by the seed; images with the same pixels come to the same side. Prints the classes and the
next command.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection.data.voc_prepare import (  # noqa: E402
    SPLITS,
    draw_split,
    find_pairs,
    link_into,
    read_pairs,
    write_splits,
)
from moco.errors import ConfigError, exit_on_error  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--output-dir", type=Path, metavar="OUT", help="for a flat FOLDER")
    parser.add_argument(
        "--test-fraction", type=float, default=0.2, metavar="F", help="of the images; default 0.2"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split; default 0")
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace {' and '.join(SPLITS)} that exist"
    )
    return parser.parse_args(argv)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not 0 < args.test_fraction < 1:
        raise ConfigError(f"--test-fraction {args.test_fraction:g}: allowed is above 0, below 1")
    folder = args.folder.expanduser()
    found = find_pairs(folder)
    if found.is_flat and args.output_dir is None:
        raise ConfigError(
            f"{folder}: is a flat folder of {len(found.pairs)} annotated images; give "
            "--output-dir OUT, where a VOC-format folder of them is made"
        )
    if not found.is_flat and args.output_dir is not None:
        raise ConfigError(
            f"{folder}: has Annotations and JPEGImages, so the splits are written into it; leave "
            "out --output-dir"
        )
    print(found.line())
    content = read_pairs(found.pairs)
    split = draw_split(content, args.test_fraction, args.seed)
    root = folder
    if found.is_flat:
        root = args.output_dir.expanduser()
        link_into(root, found.pairs, lambda partial: write_splits(partial, split, overwrite=False))
    else:
        write_splits(root, split, overwrite=args.overwrite)
    for line in content.lines(split):
        print(line)
    print(f"{root / 'ImageSets' / 'Main'}: {', '.join(f'{name}.txt' for name in SPLITS)} written")
    print(_next_command(root, content.class_names))
    return 0


def _next_command(root: Path, class_names: tuple[str, ...]) -> str:
    train, test = (_quoted((name,)) for name in SPLITS)
    return (
        "next: python detection/train_net.py --config-file "
        "configs/own_data/bccd_R_50_C4_moco.yaml --trials 5 \\\n"
        f"    DATASETS.VOC_ROOT {shlex.quote(str(root))} \\\n"
        f"    DATASETS.VOC_CLASSES {_quoted(class_names)} \\\n"
        f"    DATASETS.TRAIN {train} DATASETS.TEST {test} \\\n"
        f"    MODEL.ROI_HEADS.NUM_CLASSES {len(class_names)} \\\n"
        "    MODEL.WEIGHTS moco_d2.pth OUTPUT_DIR runs/own"
    )


def _quoted(names: tuple[str, ...]) -> str:
    """For a shell: double quotes, as tuples are written in the documentation, where they do."""
    text = repr(names)
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


if __name__ == "__main__":
    main()
