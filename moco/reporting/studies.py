"""The sections of a study and of a linear classification, from their results.json."""

from __future__ import annotations

from collections.abc import Mapping

from moco.reporting.page import Image, Section, Table, draw
from moco.studies.table import cells


def study_sections(content: Mapping, name: str) -> list[Section]:
    """The table of a study (`moco.studies.table.collect`), and a figure of each accuracy."""
    published = list(dict.fromkeys(c for row in content["rows"] for c in row["published"]))
    header, rows = cells(content, published)
    blocks: list = [Table(header, rows)]
    blocks.append("Ours: mean ± standard deviation (n - 1) over seeds.")
    if content["source"]:
        blocks.append(f"Published: {content['source']}.")
    blocks += [
        f"Failed: {row['name']}: {error}" for row in content["rows"] for error in row["errors"]
    ]
    for column, other in (("kNN top-1", None), ("linear top-1", "top-1"), ("AP50", "AP50")):
        if any(column in row["figures"] for row in content["rows"]):
            blocks.append(_points(content, name, column, other))
    return [Section(f"Study: {content['title']}", blocks)]


def _points(content: Mapping, name: str, column: str, published: str | None) -> Image:
    """Means with their spread, a row each, beside the published figures."""
    rows = [row for row in content["rows"] if column in row["figures"]]
    data = [
        (
            row["name"],
            row["figures"][column]["mean"],
            row["figures"][column]["std"],
            row["published"].get(published),
        )
        for row in rows
    ]

    def paint(figure) -> None:
        axes = figure.subplots()
        places = range(len(data))
        means = [mean for _, mean, _, _ in data]
        spread = [std or 0 for _, _, std, _ in data]
        axes.errorbar(means, places, xerr=spread, fmt="o", capsize=3, label="ours")
        shown = [(value, place) for place, (*_, value) in enumerate(data) if value is not None]
        if shown:
            axes.scatter(*zip(*shown, strict=True), color="C3", marker="D", label="published")
            axes.legend()
        axes.set_yticks(places, [row_name for row_name, *_ in data])
        axes.invert_yaxis()
        axes.set_xlabel(f"{column} (%)")
        axes.grid(axis="x", alpha=0.25)

    caption = f"{column}: mean and standard deviation over seeds"
    csv_data = (("run", "mean", "std", "published"), data)
    file_name = f"{name}_{column.lower().replace(' ', '_').replace('-', '')}"
    return draw(file_name, caption, (9, 0.42 * len(data) + 1.2), paint, csv_data)
