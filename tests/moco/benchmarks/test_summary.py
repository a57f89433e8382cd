"""The page of all measurements: every comparison of every file is in it."""

from __future__ import annotations

import json

import pytest

from moco.benchmarks import summary
from moco.errors import DataError


def row(speedup, low, high):
    return {"median_s": 0.5, "speedup": speedup, "speedup_quartiles": [low, high], "rounds": 3}


def test_every_comparison_is_shown_with_its_baseline(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    deep = {"cases": {"R50": {"ours": row(2.0, 1.9, 2.1), "reference": row(1.0, 1.0, 1.0)}}}
    content = {"command": "python x", "machine": {"cpu": "c", "gpu": None}, "versions": {}, **deep}
    (results / "step.json").write_text(json.dumps(content))
    (results / "other.json").write_text(json.dumps({"bytes": {"a": 1}}))
    text = summary.write_summary(results).read_text()
    assert "| step: cases: R50 | ours | 0.5 | 2.00 | 1.90 to 2.10 | reference |" in text
    assert "- **step**: `python x`; cpu c; " in text and "- **other**" in text
    assert (tmp_path / summary.PLOT).read_bytes().startswith(b"\x89PNG")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no comparison"):
        summary.write_summary(tmp_path)
