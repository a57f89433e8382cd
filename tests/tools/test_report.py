"""tools/report.py: what its sections show, and that the HTML file needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import tiny
from PIL import Image
from scripts import load_tool

from moco.config import load_pretrain_config
from moco.data.images import find_images
from moco.reporting import page, pictures, pretraining, studies

report_tool, pretrain_tool = load_tool("report"), load_tool("pretrain")


def ended(main, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


@pytest.fixture
def run_folder(image_folder, tmp_path):
    config = tmp_path / "empty.yaml"
    config.write_text("METHOD: moco\n")
    out = tmp_path / "run"
    code = ended(
        pretrain_tool.main, "--config-file", config, "--data", image_folder, "--output-dir", out,
        "--device", "cpu", *tiny.overrides(TRAIN__EPOCHS=2),
    )  # fmt: skip
    assert code == 0
    return out


def outside_references(html: str) -> list[str]:
    """Everything in a page that a browser would fetch."""
    found = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']?([^"'\s>]+)""", html)
    found += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", html)
    found += re.findall(r"<(script|link|iframe|object|embed)\b", html)
    flat = ["".join(f) for f in found]
    return [f for f in flat if not f.startswith(("data:image/png;base64,", "#"))]


def test_a_run_is_reported_with_its_curves_pictures_and_environment(
    run_folder, image_folder, tmp_path, capsys
):
    out = tmp_path / "report"
    assert ended(report_tool.main, run_folder, "--data", image_folder, "--output-dir", out) == 0
    assert "report.html" in capsys.readouterr().out
    html, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for title in ("Settings", "Curves", "Health", "Cost and environment", "Augmented views",
                  "Nearest neighbours"):  # fmt: skip
        assert f">{title}</h2>" in html and f"## {title}\n" in text
    assert "finished: 8 of 8 steps" in html and "torchvision" in html
    assert outside_references(html) == []
    assert "default-src 'none'" in html
    # Each figure in the page is the PNG beside it, and its CSV holds the numbers of the log.
    embedded = {base64.b64decode(d) for d in re.findall(r"base64,([A-Za-z0-9+/=]+)", html)}
    files = {p.read_bytes() for p in (out / "figures").glob("*.png")}
    assert embedded == files and len(files) >= 6
    for link in re.findall(r"\]\((\S+)\)", text):
        assert (out / link).is_file()
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    losses = [str(r["loss"]) for r in log if r["kind"] == "step"]
    csv = (out / "figures" / "run_loss.csv").read_text().splitlines()
    assert csv[0] == "step,loss" and [line.split(",")[1] for line in csv[1:]] == losses
    knn = (out / "figures" / "run_knn_top1.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in knn[1:]] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "html",
    ['<img src="https://x.org/a.png">', "<script>1</script>", '<link rel="x">',
     "<style>body{background:url(//x.org/a)}</style>"],
)  # fmt: skip
def test_negative_control_outside_references_are_found(html):
    assert outside_references(html) != []


def test_text_from_outside_is_escaped():
    table = page.Table(("<b>",), [["<script>alert(1)</script>"]])
    html = page.html_page("<i>", [page.Section("<u>", ["<p>", table])])
    for tag in ("<b>", "<script>", "<i>", "<u>"):
        assert tag not in html


def test_a_study_is_reported_with_published_and_missing_figures(tmp_path):
    rows = [
        {"name": "A", "published": {"top-1": 60.6}, "planned": 2, "finished": 2, "errors": [],
         "figures": {"kNN top-1": {"mean": 40.0, "std": 1.0, "values": [39.0, 41.0]}}},
        {"name": "B", "published": {}, "planned": 2, "finished": 0, "errors": ["it | died"],
         "figures": {}},
    ]  # fmt: skip
    folder = tmp_path / "study"
    folder.mkdir()
    content = {"title": "two", "source": "somewhere", "rows": rows}
    (folder / "results.json").write_text(json.dumps(content))
    assert ended(report_tool.main, folder, "--output-dir", tmp_path / "report") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| A | 2 | 40.00 ± 1.00 | 60.60 |" in text
    assert "| B | 0 of 2, 1 failed | missing |  |" in text and "Failed: B: it | died" in text
    [section] = studies.study_sections(content, "x")
    assert sum(isinstance(block, page.Image) for block in section.blocks) == 1


def test_a_folder_without_a_known_run_is_refused(tmp_path, capsys):
    assert ended(report_tool.main, tmp_path, "--output-dir", tmp_path / "report") == 2
    assert "holds no run that is known here" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_log_without_steps_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no training step yet"):
        pretraining.read_log(tmp_path / "log.jsonl")


def test_neighbours_of_an_image_are_those_of_its_class(image_folder, run_folder):
    """The two classes are red and blue; mean colour as the feature must find the same colour."""
    cfg = load_pretrain_config(str(run_folder / "config.yaml"))
    source = find_images(image_folder)

    class MeanColour:
        def eval(self):
            return self

        def forward_features(self, images):
            return images.mean((2, 3))

    section = pictures.nearest_neighbours(MeanColour(), cfg, source, num_queries=4)
    sheet = np.asarray(Image.open(io.BytesIO(section.blocks[0].png)))
    step = pictures._CELL + pictures._GAP
    for line in range(4):
        middle = sheet[18 + line * step + 20 : 18 + line * step + 90]
        cells = [middle[:, 6 + c * step + 20 : 6 + c * step + 90].mean((0, 1)) for c in range(8)]
        reddish = [cell[0] > cell[2] for cell in cells]
        assert len(set(reddish)) == 1, line
    assert pictures.spread(10, 4) == [0, 2, 5, 7] and pictures.spread(2, 5) == [0, 1]
