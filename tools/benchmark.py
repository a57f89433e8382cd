"""Measure this project beside Detectron2: alternating rounds, medians, ratios, a JSON file.

    python tools/benchmark.py evaluate [--images 4952] [--rounds 5]
    python tools/benchmark.py detection --config-file FILE [--rounds 20] [KEY VALUE ...]

`evaluate` scores a generated result set in the size of VOC07 test; `detection` times training
iterations and test images of a detection YAML. Results go to benchmarks/results/. Without
Detectron2 this project is measured alone, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moco.errors import exit_on_error  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=4952, help="default: VOC07 test's 4952")
    parser.add_argument("--detections", type=float, default=30.0, help="mean per image")
    parser.add_argument("--year", type=int, choices=(2007, 2012), default=2007, help="the metric's")
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")


def run_evaluate(args: argparse.Namespace) -> None:
    from detection.benchmarks import evaluate

    evaluate.run(
        num_images=args.images,
        mean_detections=args.detections,
        year=args.year,
        num_rounds=args.rounds,
        output=args.output,
    )


def add_detection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="detection YAML")
    parser.add_argument("--rounds", type=int, default=20, help="at least 3")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="KEY VALUE")


def run_detection(args: argparse.Namespace) -> None:
    from detection.benchmarks import detection

    detection.run(
        args.config_file,
        args.overrides,
        num_rounds=args.rounds,
        device=args.device,
        output=args.output,
    )


# name -> (what it measures, adds its arguments, runs). What is slow to import is imported by run.
COMMANDS = {
    "evaluate": ("seconds of scoring detections by VOC's AP", add_evaluate, run_evaluate),
    "detection": ("seconds per iteration and per test image", add_detection, run_detection),
}


@exit_on_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (measures, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=measures)
        command.add_argument(
            "--output", type=Path, default=RESULTS / f"{name}.json", metavar="FILE"
        )
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
