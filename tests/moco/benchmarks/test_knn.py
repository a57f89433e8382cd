"""The measurement of a neighbour search, in small."""

from __future__ import annotations

import json

from scripts import load_tool


def test_computed_and_measured_memory(tmp_path, capsys):
    load = load_tool("benchmark")
    try:
        load.main(["knn", "--train", "60000", "--test", "64", "--width", "512", "--k", "10",
                   "--output", str(tmp_path / "knn.json")])  # fmt: skip
    except SystemExit as ended:
        assert not ended.code
    results = json.loads((tmp_path / "knn.json").read_text())
    blocks, whole = (results["searches"][name] for name in ("in blocks", "all at once"))
    assert whole["computed_bytes"] == 60000 * 512 * 4
    assert whole["measured_bytes"] > 0.8 * whole["computed_bytes"]
    assert blocks["measured_bytes"] < blocks["computed_bytes"] + 16 * 2**20
    assert blocks["measured_bytes"] < whole["measured_bytes"] - 24 * 2**20
    assert "| in blocks | " in capsys.readouterr().out
    assert results["imagenet_computed_bytes"]["float16"] < 2**30
