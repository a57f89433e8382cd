"""The sections of a pretraining run, from the files in its folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from moco.cfgnode import flatten
from moco.errors import DataError
from moco.reporting.page import Image, Section, Table, draw
from moco.safe_yaml import read_yaml
from moco.training import checkpoint as ckpt
from moco.training.progress import format_duration

_SHOWN_KEYS = (
    "METHOD", "MODEL.ARCH", "MODEL.HEAD", "MODEL.BN_SPLITS", "MOCO.QUEUE_SIZE", "MOCO.MOMENTUM",
    "MOCO.TEMPERATURE", "DATA.RECIPE", "DATA.SIZE", "TRAIN.EPOCHS", "TRAIN.BATCH_SIZE", "TRAIN.LR",
    "TRAIN.SCHEDULE", "TRAIN.OPTIMIZER", "TRAIN.WEIGHT_DECAY", "TRAIN.AMP", "SEED",
)  # fmt: skip
_PANELS_A_ROW = 3
_FEW_POINTS = 30  # drawn with dots, or a single one could not be seen


def is_pretraining_run(folder: Path) -> bool:
    return (folder / "log.jsonl").is_file() and (folder / "config.yaml").is_file()


def pretraining_sections(folder: Path, name: str) -> list[Section]:
    """Settings, curves of loss, learning rate, kNN and health, cost, environment.

    Args:
        name: begins the names of the figures' files.
    Raises: DataError where the log holds no step.
    """
    steps, epochs = read_log(folder / "log.jsonl")
    manifest = _newest_manifest(folder)
    return [
        _settings(folder, steps, manifest),
        _curves(steps, epochs, name),
        *_health(steps, name),
        _cost(folder, steps, manifest),
    ]


def read_log(path: Path) -> tuple[list[dict], list[dict]]:
    """The step and the epoch records of a log. Raises: DataError where no step is in it."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}: line {number} is no JSON ({error})") from error
    steps = [r for r in records if r["kind"] == "step"]
    if not steps:
        raise DataError(f"{path}: holds no training step yet; wait for the first log record")
    return steps, [r for r in records if r["kind"] == "epoch" and r["metrics"]]


def _settings(folder: Path, steps: list[dict], manifest: dict | None) -> Section:
    keys = flatten(read_yaml(folder / "config.yaml"))
    last = steps[-1]
    state = "finished" if last["step"] == last["total_steps"] else "not finished"
    words = (
        f"{state}: {last['step']} of {last['total_steps']} steps, "
        f"epoch {last['epoch'] + 1} of {last['num_epochs']}."
    )
    if manifest:
        words += f" Configuration digest {manifest['config_digest']}."
    shown = [[key, str(keys[key])] for key in _SHOWN_KEYS if key in keys]
    every = [[key, str(value)] for key, value in sorted(keys.items())]
    return Section(
        "Settings",
        [
            words,
            Table(("key", "value"), shown),
            Table(("key", "value"), every, caption="all keys", folded=True),
        ],
    )


def _curves(steps: list[dict], epochs: list[dict], name: str) -> Section:
    blocks: list = [curve_image(f"{name}_loss", "loss", steps, lambda r: r["loss"])]
    blocks.append(curve_image(f"{name}_lr", "learning rate", steps, lambda r: r["lr"]))
    for metric in dict.fromkeys(m for r in epochs for m in r["metrics"]):
        rows = [(r["epoch"], r["metrics"][metric]) for r in epochs if metric in r["metrics"]]
        blocks.append(_epoch_image(f"{name}_{metric}", metric, rows))
    return Section("Curves", blocks)


def curve_image(name: str, label: str, steps: Sequence[dict], read) -> Image:
    """A figure of one value of the step records against the step."""
    rows = [(r["step"], read(r)) for r in steps]

    def paint(figure) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*rows, strict=True), linewidth=1.2, marker=_marker(rows), markersize=3.5)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)

    return draw(name, f"{label} by step", (8.5, 3.0), paint, (("step", label), rows))


def _epoch_image(name: str, metric: str, rows: list[tuple[int, float]]) -> Image:
    def paint(figure) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*rows, strict=True), marker="o", markersize=3.5)
        axes.set_xlabel("epochs trained")
        axes.set_ylabel(f"{metric} (%)")
        axes.grid(alpha=0.25)

    last = f"{rows[0][1]:.2f} after {rows[0][0]} epochs, {rows[-1][1]:.2f} after {rows[-1][0]}"
    return draw(name, f"{metric}: {last}", (8.5, 3.0), paint, (("epoch", metric), rows))


def _health(steps: list[dict], name: str) -> list[Section]:
    """Panels of all figures that were logged with the steps; nothing where none were."""
    metrics = list(dict.fromkeys(m for r in steps for m in r["metrics"]))
    if not metrics:
        return []
    header = ("step", *metrics)
    rows = [(r["step"], *(r["metrics"].get(m) for m in metrics)) for r in steps]

    def paint(figure) -> None:
        columns = min(_PANELS_A_ROW, len(metrics))
        grid = figure.subplots(-(-len(metrics) // columns), columns, squeeze=False).ravel()
        for axes, metric in zip(grid, metrics, strict=False):
            points = [(r["step"], r["metrics"][metric]) for r in steps if metric in r["metrics"]]
            axes.plot(*zip(*points, strict=True), linewidth=1.1, marker=_marker(points))
            axes.set_title(metric, fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
        for axes in grid[len(metrics) :]:
            axes.set_axis_off()

    height = 2.1 * -(-len(metrics) // _PANELS_A_ROW) + 0.3
    image = draw(f"{name}_health", "figures by step", (10, height), paint, (header, rows))
    ends = [[m, *(_short(r["metrics"].get(m)) for r in (steps[0], steps[-1]))] for m in metrics]
    table = Table(("figure", f"step {steps[0]['step']}", f"step {steps[-1]['step']}"), ends)
    return [Section("Health", [image, table])]


def _cost(folder: Path, steps: list[dict], manifest: dict | None) -> Section:
    rates = [r["images_per_s"] for r in steps[1:] or steps]
    middle = statistics.median(rates)
    rows = [["images/s, median", f"{middle:.1f}"]]
    seconds = steps[-1]["time"] - steps[0]["time"]
    rows.append(["first to last log record", format_duration(seconds)])
    files = ckpt.checkpoint_files(folder)
    size = sum(f.stat().st_size for f in files)
    rows.append(["checkpoints", f"{len(files)} files, {size / 2**20:.1f} MiB"])
    for key, value in sorted((manifest or {}).get("versions", {}).items()):
        rows.append([key, str(value)])
    return Section("Cost and environment", [Table(("", ""), rows)])


def _newest_manifest(folder: Path) -> dict | None:
    """The newest verified checkpoint's manifest, with the versions that wrote it."""
    path, manifest, _ = ckpt.latest_verified(folder)
    if path is None:
        return None
    extra = ckpt.read_torch_file(path).get("extra", {})
    return {**manifest, "versions": extra.get("versions", {})}


def _marker(points: Sequence) -> str:
    return "." if len(points) < _FEW_POINTS else ""


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
