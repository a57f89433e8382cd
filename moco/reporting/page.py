"""A report as sections of text, tables, figures and pictures, written as HTML and Markdown.

The HTML file holds everything itself: its figures are data URIs, its one style sheet is inline,
it has no script, and its content security policy forbids the browser to fetch anything.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moco.training.checkpoint import write_atomic, write_text_atomic

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f23; background: #fff;
       max-width: 1060px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem;
     border-bottom: 1px solid #d8dce1; padding-bottom: .2rem; }
nav a { margin-right: 1rem; color: #0b5cad; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e6e9ed; text-align: left;
         vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { background: #f4f6f8; } figure { margin: .8rem 0; }
img { max-width: 100%; height: auto; border: 1px solid #e6e9ed; }
figcaption { color: #555c66; font-size: .85rem; }
details summary { cursor: pointer; color: #0b5cad; }
"""


@dataclass(frozen=True)
class Table:
    """A table of text; `folded` hides a long one behind its caption."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Image:
    """A figure or a picture.

    name: of its PNG (and CSV) file; png: its bytes; data: header and rows it was drawn from.
    """

    name: str
    png: bytes
    caption: str
    data: tuple[Sequence[str], Sequence[Sequence[object]]] | None = None


@dataclass
class Section:
    """A title and blocks in order: str (a paragraph), Table or Image."""

    title: str
    blocks: list[str | Table | Image] = field(default_factory=list)


def draw(
    name: str,
    caption: str,
    size: tuple[float, float],
    paint: Callable[[object], None],
    data: tuple[Sequence[str], Sequence[Sequence[object]]] | None = None,
) -> Image:
    """A matplotlib figure as an Image.

    Args:
        size: in inches. paint: draws on the empty figure.
    """
    # Drawing directly on a figure needs no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image(name, buffer.getvalue(), caption, data)


def write_report(title: str, sections: Sequence[Section], output_dir: Path) -> Path:
    """Write report.html, report.md and figures/*.png, *.csv. Returns the path of report.html."""
    images = [b for section in sections for b in section.blocks if isinstance(b, Image)]
    names = [image.name for image in images]
    assert len(set(names)) == len(names), f"two images of one name: {names}"
    for image in images:
        path = output_dir / "figures" / f"{image.name}.png"
        write_atomic(path, lambda file, png=image.png: file.write(png))
        if image.data:
            write_text_atomic(path.with_suffix(".csv"), csv_text(*image.data))
    write_text_atomic(output_dir / "report.md", markdown(title, sections))
    write_text_atomic(output_dir / "report.html", html_page(title, sections))
    return output_dir / "report.html"


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue()


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The report as one HTML file."""
    anchors = [f"s{number}" for number in range(len(sections))]
    links = "".join(
        f'<a href="#{a}">{html.escape(s.title)}</a>' for a, s in zip(anchors, sections, strict=True)
    )
    body = "".join(
        f'<h2 id="{a}">{html.escape(s.title)}</h2>\n' + "".join(map(_html_block, s.blocks))
        for a, s in zip(anchors, sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><nav>{links}</nav>\n{body}</body></html>\n"
    )


def _html_block(block: str | Table | Image) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>\n"
    if isinstance(block, Image):
        data = base64.b64encode(block.png).decode()
        caption = html.escape(block.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>\n"
        )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
    rows = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>\n" for row in block.rows)
    table = f'<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>\n'
    caption = html.escape(block.caption)
    if block.folded:
        return f"<details><summary>{caption}</summary>{table}</details>\n"
    return f"<p>{caption}</p>{table}" if caption else table


def _html_cell(cell: str) -> str:
    kind = ' class="number"' if re.fullmatch(r"[-+]?\d[\d.,e+-]*( ± [\d.]+)?", cell) else ""
    return f"<td{kind}>{html.escape(cell)}</td>"


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown, with links to the PNG files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += map(_markdown_block, section.blocks)
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: str | Table | Image) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Image):
        return f"![{block.caption}](figures/{block.name}.png)\n\n{block.caption}"
    lines = ["| " + " | ".join(map(_markdown_cell, block.header)) + " |"]
    lines.append("|" + "---|" * len(block.header))
    lines += ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in block.rows]
    table = "\n".join(lines)
    return f"{block.caption}\n\n{table}" if block.caption else table


def _markdown_cell(cell: str) -> str:
    return cell.replace("|", "/").replace("\n", " ")
