"""Convert a pretraining checkpoint to backbone weights for Detectron2's R50-C4.

    python tools/convert_to_d2.py RUN|FILE OUT.pth|OUT.pkl [--encoder query|key]

RUN is a run folder: its newest checkpoint that verifies is taken. FILE is a checkpoint of this
project, of the reference, or of another in a layout of docs/CHECKPOINTS.md. Prints what was mapped
and dropped, the self-check's figure and the config lines that the weights need.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection.convert import convert_checkpoint  # noqa: E402
from detection.self_check import SELF_CHECK_SIZE  # noqa: E402
from moco.errors import exit_on_error  # noqa: E402
from moco.training.image_record import in_words  # noqa: E402
from moco.training.layouts import ENCODERS  # noqa: E402


@exit_on_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="RUN|FILE", help="run folder or checkpoint file")
    parser.add_argument("out", metavar="OUT.pth|OUT.pkl", help="weights file to write")
    parser.add_argument(
        "--encoder", choices=ENCODERS, default="query", help="key: the momentum copy"
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PREFIX",
        help="names of unknown tensors beside the network begin so: leave them out; repeatable",
    )  # fmt: skip
    args = parser.parse_args(argv)
    report = convert_checkpoint(args.source, args.out, encoder=args.encoder, drop=args.drop)
    for _, reason in report.refused:
        print(f"passed over: {reason}")
    height, width = SELF_CHECK_SIZE
    layout = f"{report.layout.name} layout, {report.encoder} encoder, {report.shape.arch}"
    print(f"source: {report.source} ({layout})")
    for note in report.notes:
        print(f"note: {note}")
    print(f"mapped: {len(report.names)} tensors")
    for group, names in report.dropped.items():
        print(f"dropped: {len(names)} tensors, {group}")
    print(
        f"self-check on a random {height}x{width} image: features of source and converted weights "
        f"differ by at most {report.self_check['max_absolute_difference']:.3g} "
        f"(relative {report.self_check['max_relative_difference']:.3g})"
    )
    print(f"wrote: {report.out} (sha256 {report.out_sha256}) and {report.out}.conversion.json")
    print(in_words(report.images))
    print("Config lines these weights need:")
    print("\n".join(report.yaml_lines))


if __name__ == "__main__":
    main()
