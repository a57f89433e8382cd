"""results.json and results.md of an evaluation: one schema for all of them.

Beside its scores a result says what made it: engine, protocol, versions, configuration and its
digest, data set, metric, weights, seed, processes and seconds.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision

from moco.distributed import ProcessInfo
from moco.evaluation.weights import Pretrained
from moco.training.checkpoint import write_json_atomic, write_text_atomic

RESULTS_FILE, REPORT_FILE = "results.json", "results.md"


def versions(process: ProcessInfo) -> dict[str, str]:
    """Versions of what computes the numbers, and the device."""
    device = process.device
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


def describe_weights(pretrained: Pretrained) -> dict[str, object]:
    return {
        "path": pretrained.path,
        "sha256": pretrained.sha256,
        "layout": pretrained.layout,
        "arch": pretrained.arch,
        "width": pretrained.options["width"],
        "stem": pretrained.options["stem"],
        "backbone_sha256": pretrained.digest(),
    }


def describe_data(train, test) -> dict[str, object]:
    """Counts and folders of the two splits."""
    return {
        "dataset": Path(train.root).resolve().parent.name,
        "train_folder": train.root,
        "test_folder": test.root,
        "num_train": len(train),
        "num_test": len(test),
        "num_classes": len(train.class_names),
    }


def write_results(folder: Path, results: dict, tables: Sequence[str]) -> None:
    """Write results.json and results.md, whole or not at all.

    Args:
        tables: parts of the report, in Markdown, between its title and what made the numbers.
    """
    write_text_atomic(folder / REPORT_FILE, report_text(results, tables))
    write_json_atomic(folder / RESULTS_FILE, results)


def report_text(results: dict, tables: Sequence[str]) -> str:
    weights, made_by = results["weights"], results["versions"]
    rows = [
        ("protocol", results["protocol"]),
        ("metric", results["metric"]),
        ("weights", f"{weights['path']} ({weights['arch']}, {weights['layout']}, "
                    f"sha256 {weights['sha256'][:16]})"),
        ("training images", f"{results['num_train']} of {results['train_folder']}"),
        ("test images", f"{results['num_test']} of {results['test_folder']}"),
        ("seed", results.get("seed")),
        ("configuration digest", results["config_digest"]),
        ("processes", results["num_processes"]),
        ("seconds", results["seconds"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in made_by.items())),
    ]  # fmt: skip
    lines = [f"| {name} | {value} |" for name, value in rows if value is not None]
    title = f"# {results['dataset']}: {results['engine']}"
    origin = "\n".join(["| | |", "|---|---|", *lines])
    return "\n\n".join([title, *tables, origin]) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with two decimals, None as a dash."""
    shown = [[_cell(value) for value in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in shown]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
