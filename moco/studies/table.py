"""The table of a study: ours, mean and standard deviation over seeds, beside the published rows."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moco.studies.plan import PlannedRun, Study
from moco.studies.run import RESULT_FILE
from moco.training.checkpoint import read_json, write_json_atomic, write_text_atomic

_GIB = 2**30

# column -> the figure of one run's stages, or None where it was not measured.
COLUMNS: dict[str, Callable[[Mapping[str, dict]], float | None]] = {
    "kNN untrained": lambda s: s["pretrain"].get("knn_untrained"),
    "kNN top-1": lambda s: s["pretrain"].get("knn_top1"),
    "linear top-1": lambda s: s.get("linear", {}).get("top1"),
    "AP50": lambda s: s.get("detection", {}).get("AP50"),
    "AP": lambda s: s.get("detection", {}).get("AP"),
    "AP75": lambda s: s.get("detection", {}).get("AP75"),
    "loss": lambda s: s["pretrain"].get("loss"),
    "images/s": lambda s: s["pretrain"].get("images_per_s"),
    "memory GB": lambda s: s["pretrain"]["peak_rss_bytes"] / _GIB,
}


def collect(study: Study, runs: Sequence[PlannedRun], output_dir: Path) -> dict:
    """Everything known about a study, for results.json.

    Returns: {"title", "source", "rows": [{"name", "keys", "published", "finished", "planned",
        "errors", "figures": {column: {"mean", "std", "values"}}}]}. Runs without a result are
        missing: counted in "planned", not in "finished". std (n - 1) is None for a single run.
    """
    rows = []
    for row in study.rows:
        planned = [run for run in runs if run.row == row.name]
        results = [_result(output_dir, run) for run in planned]
        finished = [r["stages"] for r in results if r and "error" not in r]
        rows.append(
            {
                "name": row.name,
                "keys": row.keys,
                "published": row.published,
                "planned": len(planned),
                "finished": len(finished),
                "errors": [r["error"] for r in results if r and "error" in r],
                "figures": _figures(finished),
            }
        )
    return {"title": study.title, "source": study.source, "rows": rows}


def _result(output_dir: Path, run: PlannedRun) -> dict | None:
    path = output_dir / run.folder / RESULT_FILE
    result = read_json(path) if path.is_file() else None
    return result if result and result.get("config_digest") == run.digest else None


def _figures(finished: Sequence[Mapping[str, dict]]) -> dict[str, dict]:
    figures = {}
    for column, read in COLUMNS.items():
        values = [v for v in map(read, finished) if v is not None]
        if values:
            figures[column] = {
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            }
    return figures


def cells(content: dict, published: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as text."""
    ours = [c for c in COLUMNS if any(c in row["figures"] for row in content["rows"])]
    header = ["", "seeds", *ours, *(f"{column} published" for column in published)]
    lines = []
    for row in content["rows"]:
        line = [row["name"], _seeds(row)]
        line += [_figure(row["figures"].get(column)) for column in ours]
        line += [_number(row["published"].get(column)) for column in published]
        lines.append(line)
    return header, lines


def _seeds(row: dict) -> str:
    if row["finished"] == row["planned"]:
        return str(row["planned"])
    failed = f", {len(row['errors'])} failed" if row["errors"] else ""
    return f"{row['finished']} of {row['planned']}{failed}"


def _figure(figure: dict | None) -> str:
    if figure is None:
        return "missing"
    std = figure["std"]
    return _number(figure["mean"]) + ("" if std is None else f" ± {_number(std)}")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    digits = 2 if abs(value) < 100 or not math.isfinite(value) else 0
    return f"{value:.{digits}f}"


def markdown(content: dict, published: Sequence[str]) -> str:
    """The study as Markdown: title, table, source of the published figures, errors."""
    header, lines = cells(content, published)
    text = [f"# {content['title']}", "", "| " + " | ".join(header) + " |"]
    text.append("|" + "---|" * len(header))
    text += ["| " + " | ".join(line) + " |" for line in lines]
    text += ["", "Ours: mean ± standard deviation (n - 1) over seeds."]
    if content["source"]:
        text.append(f"Published: {content['source']}.")
    for row in content["rows"]:
        text += [f"Failed: {row['name']}: {error}" for error in row["errors"]]
    return "\n".join(text) + "\n"


def write(content: dict, published: Sequence[str], output_dir: Path) -> str:
    """Write results.json, results.md and results.csv; returns the Markdown."""
    text = markdown(content, published)
    write_json_atomic(output_dir / "results.json", content)
    write_text_atomic(output_dir / "results.md", text)
    buffer = io.StringIO()
    header, lines = cells(content, published)
    csv.writer(buffer).writerows([header, *lines])
    write_text_atomic(output_dir / "results.csv", buffer.getvalue())
    return text
