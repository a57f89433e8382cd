"""All committed measurements as one page: benchmarks/README.md with a table and a plot."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from moco.errors import DataError
from moco.training.checkpoint import read_json, write_atomic, write_text_atomic

PLOT = "summary.png"
_BAR = 0.3  # inches
_SUFFICES = {"median_s", "speedup", "speedup_quartiles"}


def write_summary(results_dir: Path) -> Path:
    """Write README.md and summary.png beside the folder of the results. Returns README.md.

    Raises: DataError where the folder holds no measurement.
    """
    files = sorted(results_dir.glob("*.json"))
    contents = {path.stem: read_json(path) for path in files}
    groups = [group for name, content in contents.items() for group in comparisons(name, content)]
    if not groups:
        raise DataError(f"{results_dir}: holds no comparison; run tools/benchmark.py first")
    target = results_dir.parent / "README.md"
    write_text_atomic(target, markdown(contents, groups))
    write_atomic(results_dir.parent / PLOT, lambda file: file.write(plot(groups)))
    return target


def comparisons(name: str, content: object) -> Iterator[tuple[str, dict[str, dict]]]:
    """(title, rows of `record.compare`) of every comparison in a result file, at any depth."""
    if not isinstance(content, dict):
        return
    rows = {k: v for k, v in content.items() if isinstance(v, dict) and _SUFFICES <= v.keys()}
    if rows:
        yield name, rows
        return
    for key, value in content.items():
        yield from comparisons(f"{name}: {key}", value)


def baseline(rows: dict[str, dict]) -> str:
    """What the rows are compared with: the one whose ratios are all 1."""
    ones = [1.0, 1.0]
    return next((n for n, r in rows.items() if r["speedup_quartiles"] == ones), next(iter(rows)))


def markdown(contents: dict[str, dict], groups: list[tuple[str, dict[str, dict]]]) -> str:
    """The page: how to read it, one table, then machine, versions and command of each file."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python tools/benchmark.py summary` from `results/*.json`. All sides of a "
        "comparison ran in one run, alternating; times are medians, ratios the median of the "
        "rounds' ratios with its quartiles. Ratios carry over to similar machines, seconds do not.",
        "",
        f"![times faster than the baseline]({PLOT})",
        "",
        "| measurement | side | median s | times faster | quartiles | than |",
        "|---|---|---|---|---|---|",
    ]
    for title, rows in groups:
        base = baseline(rows)
        for name, row in rows.items():
            low, high = row["speedup_quartiles"]
            lines.append(
                f"| {title} | {name} | {row['median_s']:.4g} | {row['speedup']:.2f} | "
                f"{low:.2f} to {high:.2f} | {base} |"
            )
    lines += ["", "## Commands and machines", ""]
    for name, content in contents.items():
        machine, versions = content.get("machine", {}), content.get("versions", {})
        where = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
        what = ", ".join(f"{key} {value}" for key, value in versions.items())
        lines.append(f"- **{name}**: `{content.get('command', '')}`; {where}; {what}")
    return "\n".join(lines) + "\n"


def plot(groups: list[tuple[str, dict[str, dict]]]) -> bytes:
    """Bars of all ratios, a panel a comparison, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [len(rows) * _BAR + 0.75 for _, rows in groups]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(panels, groups, strict=True):
        base = baseline(rows)
        values = [row["speedup"] for row in rows.values()]
        spread = [
            [max(0.0, r["speedup"] - r["speedup_quartiles"][0]) for r in rows.values()],
            [max(0.0, r["speedup_quartiles"][1] - r["speedup"]) for r in rows.values()],
        ]
        colours = ["0.6" if name == base else "C0" for name in rows]
        axes.barh(range(len(rows)), values, xerr=spread, color=colours, height=0.7, capsize=2)
        for place, value in enumerate(values):
            where = axes.get_yaxis_transform()  # beside the panel, clear of the spread
            axes.text(1.01, place, f"{value:.2f}", va="center", fontsize=8, transform=where)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.set_title(f"{title} (times faster than {base})", fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * 1.12)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
