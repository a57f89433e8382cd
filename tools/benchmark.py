"""Measure this project beside Detectron2: alternating rounds, medians, ratios, a JSON file.

    python tools/benchmark.py data [--data DIR] [--images 64] [--workers 1 2] [--rounds 9]
    python tools/benchmark.py step [--cases r50_112 r50_224 r18_32 r18_cifar] [--profile 3]
    python tools/benchmark.py train [--data DIR] [--workers 1 2] [--steps 20] [--rounds 5]
    python tools/benchmark.py evaluate [--images 4952] [--rounds 5]
    python tools/benchmark.py detection --config-file FILE [--rounds 20] [KEY VALUE ...]
    python tools/benchmark.py communication [--processes 2 4] [--arch resnet50] [--batch 8]

`evaluate` scores a generated result set in the size of VOC07 test; `detection` times training
iterations and test images of a detection YAML; `communication` counts the bytes that training
steps send between processes. Results go to benchmarks/results/. Without
Detectron2 this project is measured alone, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moco.errors import exit_on_error  # noqa: E402
from moco.signals import exit_on_signals  # noqa: E402

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


def add_communication(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="gloo, on a CPU")
    parser.add_argument("--arch", default="resnet50", help="network, a value of MODEL.ARCH")
    parser.add_argument("--width", type=float, default=1.0, help="factor on its channels")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8, help="images of each process")
    parser.add_argument("--queue", type=int, default=65536, help="keys in the queue")
    parser.add_argument("--steps", type=int, default=4, help="counted, after 2 to warm up")


def run_communication(args: argparse.Namespace) -> None:
    from moco.benchmarks import communication

    options = communication.Options(
        arch=args.arch,
        width=args.width,
        image_size=args.image_size,
        batch=args.batch,
        queue=args.queue,
        steps=args.steps,
    )
    communication.run(options, processes=args.processes, output=args.output)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="images; default: generated JPEG files")
    parser.add_argument("--images", type=int, default=64, help="how many, each in every round")
    parser.add_argument("--size", type=int, default=224, help="of a view")
    parser.add_argument("--rounds", type=int, default=9, help="at least 3")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of the loaders")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--loader-batches", type=int, default=4, help="a worker and round")


def run_data(args: argparse.Namespace) -> None:
    from moco.benchmarks import data

    options = data.Options(
        num_images=args.images,
        size=args.size,
        num_rounds=args.rounds,
        workers=tuple(args.workers),
        batch=args.batch,
        loader_batches=args.loader_batches,
    )
    data.run(options, folder=args.data, output=args.output)


def add_step(parser: argparse.ArgumentParser) -> None:
    from moco.benchmarks import step

    parser.add_argument("--cases", nargs="+", default=list(step.DEFAULT_CASES), choices=step.CASES)
    parser.add_argument(
        "--sides", nargs="+", default=list(step.DEFAULT_SIDES), choices=step.SIDES,
        help="the first is what the others are compared with",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="steps of each side, at least 3")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of a step on the CPU; default: torch's")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="profile N steps of each side"
    )
    parser.add_argument("--peak-side", type=int, help="of the matrices that measure the limit")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY VALUE", help="keys of all cases and sides"
    )


def run_step(args: argparse.Namespace) -> None:
    from moco.benchmarks import step

    options = step.Options(
        cases=args.cases,
        sides=args.sides,
        overrides=args.set,
        num_rounds=args.rounds,
        device=args.device,
        threads=args.threads,
        num_profiled=args.profile,
        peak_side=args.peak_side,
    )
    step.run(options, output=args.output)


def add_train(parser: argparse.ArgumentParser) -> None:
    from moco.benchmarks import train

    parser.add_argument("--data", metavar="DIR", help="images; default: generated JPEG files")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of the loader")
    parser.add_argument("--steps", type=int, default=20, help="of each part and round")
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of a step; default: what workers leave")
    parser.add_argument(
        "--epoch-images", type=int, default=50_000, help="of the epoch a checkpoint is spread over"
    )
    parser.add_argument(
        "--set", nargs="+", default=list(train.DEFAULT_WORDS), metavar="KEY VALUE", help="keys"
    )


def run_train(args: argparse.Namespace) -> None:
    from moco.benchmarks import train

    options = train.Options(
        overrides=args.set,
        workers=tuple(args.workers),
        num_steps=args.steps,
        num_rounds=args.rounds,
        device=args.device,
        threads=args.threads,
        epoch_images=args.epoch_images,
    )
    train.run(options, folder=args.data, output=args.output)


def add_knn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=int, default=100_000, help="training samples")
    parser.add_argument("--test", type=int, default=2_000, help="test samples")
    parser.add_argument("--width", type=int, default=2048, help="features of a sample")
    parser.add_argument("--k", type=int, default=200, help="neighbours")


def run_knn(args: argparse.Namespace) -> None:
    from moco.benchmarks import knn

    knn.run(knn.Sizes(args.train, args.test, args.width, args.k), output=args.output)


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="images; default: generated JPEG files")
    parser.add_argument("--images", type=int, default=2000, help="how many to generate")
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    parser.add_argument("--block-size", type=int, default=64, help="DATA.BLOCK_SIZE")
    parser.add_argument("--blocks-in-flight", type=int, default=8, help="DATA.BLOCKS_IN_FLIGHT")
    parser.add_argument("--warm", action="store_true", help="from the page cache, not the disk")


def run_reading(args: argparse.Namespace) -> None:
    from moco.benchmarks import reading

    options = reading.Options(
        num_images=args.images,
        num_rounds=args.rounds,
        block_size=args.block_size,
        blocks_in_flight=args.blocks_in_flight,
        warm=args.warm,
    )
    reading.run(options, folder=args.data, output=args.output)


def add_summary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")


def run_summary(args: argparse.Namespace) -> None:
    from moco.benchmarks import summary

    print(summary.write_summary(args.results))


# name -> (what it measures, adds its arguments, runs). What is slow to import is imported by run.
COMMANDS = {
    "data": ("image pairs per second of the augmentation", add_data, run_data),
    "step": ("seconds and memory of a training step", add_step, run_step),
    "train": ("what the loop loses between data and step", add_train, run_train),
    "reading": ("files per second from a folder and from its pack", add_reading, run_reading),
    "evaluate": ("seconds of scoring detections by VOC's AP", add_evaluate, run_evaluate),
    "detection": ("seconds per iteration and per test image", add_detection, run_detection),
    "knn": ("memory of a neighbour search, computed and measured", add_knn, run_knn),
    "communication": ("bytes a process receives in a step", add_communication, run_communication),
    "summary": ("writes benchmarks/README.md of all results", add_summary, run_summary),
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
    with exit_on_signals():
        args.run(args)


if __name__ == "__main__":
    main()
