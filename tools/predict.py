"""Detect objects on images with a fine-tuned model, draw them and write them to a file.

    python tools/predict.py TRIAL_DIR IMAGES... | FOLDER --output-dir DIR [--threshold 0.5]
    python tools/predict.py MODEL.pth --config-file FILE IMAGES... | FOLDER --output-dir DIR

TRIAL_DIR holds config.yaml and model_final.pth, e.g. runs/voc/trial_0. Writes DIR/pictures/ and
DIR/detections.json. Exit status: 0, 1 if an image could not be read (each is listed, the others
are done), 2 for a wrong input (one line says which).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection.engines.base import Engine  # noqa: E402
from detection.engines.select import CHOICES, select_engine  # noqa: E402
from detection.predict import (  # noqa: E402
    DETECTIONS_FILE,
    PICTURES_FOLDER,
    Model,
    find_images,
    find_model,
    predict_images,
)
from moco import devices, distributed  # noqa: E402
from moco.errors import ConfigError, exit_on_error  # noqa: E402

EXIT_BAD_IMAGE = 1
MAX_LINES_OFF_TERMINAL = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="TRIAL_DIR|MODEL.pth", help="what was fine-tuned")
    parser.add_argument("images", nargs="+", help="image files, or folders of images")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--config-file", metavar="FILE", help="default: config.yaml beside it")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score that is kept, 0 to 1"
    )
    parser.add_argument("--engine", choices=CHOICES, default="auto")
    parser.add_argument("--device", choices=devices.CHOICES, default="auto")
    return parser.parse_args(argv)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not 0 <= args.threshold <= 1:
        raise ConfigError(f"--threshold {args.threshold}: allowed is 0 to 1")
    model = find_model(args.model, args.config_file)
    left_out: Counter[str] = Counter()
    images = find_images(args.images, args.output_dir, left_out)
    wants_cpu = args.device == "auto" and model.cfg.MODEL.DEVICE == "cpu"
    process = distributed.setup_process("cpu" if wants_cpu else args.device)
    engine, why = choose_engine(args.engine, model, process.device.type)
    print(f"engine: {engine.name} ({why}), {process.device}")
    others = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(left_out.items()))
    print(
        f"model: {model.weights}, {len(model.class_names)} classes; {len(images)} image(s)"
        + (f"; left out, as no image by their names: {others}" if others else "")
    )
    if not model.names_itself:
        names = ", ".join(model.class_names)
        print(f"classes: the model does not name them; the configuration does, in order: {names}")
    progress = Progress(len(images))
    num_objects, failed = 0, []
    outcomes = predict_images(
        model, engine, process, images, args.output_dir, threshold=args.threshold
    )
    for outcome in outcomes:
        num_objects += len(outcome.get("boxes", ()))
        if "error" in outcome:
            failed.append(outcome["error"])
            progress.interrupt(f"not read: {outcome['error']}")
        if "warning" in outcome:
            progress.interrupt(f"warning: {outcome['file']}: {outcome['warning']}")
        progress.step()
    print(
        f"{num_objects} objects with score >= {args.threshold:g} on {len(images) - len(failed)} "
        f"image(s): {args.output_dir / PICTURES_FOLDER}, {args.output_dir / DETECTIONS_FILE}"
    )
    if failed:
        print(f"{len(failed)} of {len(images)} image(s) could not be read", file=sys.stderr)
    return EXIT_BAD_IMAGE if failed else 0


def choose_engine(name: str, model: Model, device_type: str) -> tuple[Engine, str]:
    """The engine asked for; for "auto" the one the model was trained by, where it can run."""
    if device_type not in ("cpu", "cuda"):
        if name == "detectron2":
            raise ConfigError(f"--engine detectron2: not with --device {device_type}; leave it out")
        return select_engine("embedded")[0], f"the one that runs on {device_type}"
    if name == "auto" and model.trained_by in CHOICES:
        try:
            return select_engine(model.trained_by)[0], "auto: it trained the model"
        except ConfigError:
            pass  # it is not installed here; both engines run each other's models
    return select_engine(name, model.cfg, device_type)


class Progress:
    """Images done, rate and remaining time: one refreshed line on a terminal, few lines else."""

    def __init__(self, num_images: int, stream=None):
        self._end = num_images
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._period = 1 if self._is_terminal else max(1, -(-num_images // MAX_LINES_OFF_TERMINAL))
        self._done = 0
        self._started = time.perf_counter()

    def step(self) -> None:
        self._done += 1
        is_last = self._done == self._end
        if self._done % self._period and not is_last:
            return
        rate = self._done / max(time.perf_counter() - self._started, 1e-9)
        left = timedelta(seconds=round((self._end - self._done) / rate))
        line = f"{self._done}/{self._end} images  {rate:.2f} images/s  ETA {left}"
        start, end = ("\r\x1b[K", "\n" if is_last else "") if self._is_terminal else ("", "\n")
        self._stream.write(f"{start}{line}{end}")
        self._stream.flush()

    def interrupt(self, line: str) -> None:
        """Print a line of its own."""
        start = "\r\x1b[K" if self._is_terminal else ""
        self._stream.write(f"{start}{line}\n")
        self._stream.flush()


if __name__ == "__main__":
    main()
