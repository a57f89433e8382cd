"""The measurement of reading folders and packs, tiny: what it compares, counts and writes."""

from __future__ import annotations

import json

import pytest
from packs import pack_folder, write_images
from scripts import load_tool


def measure(output, *words) -> int:
    with pytest.raises(SystemExit) as end:
        arguments = ["reading", "--rounds", "3", "--output", str(output), *map(str, words)]
        load_tool("benchmark").main(arguments)
    return end.value.code


def test_every_way_of_reading_is_measured(tmp_path, capsys):
    out = tmp_path / "out" / "r.json"
    assert measure(out, "--images", 5, "--block-size", 2, "--blocks-in-flight", 2) == 0
    content = json.loads(out.read_text())
    ways = ["folder", "pack", "pack, blocks", "pack, blocks read ahead"]
    assert list(content["compared"]) == ways and content["num_images"] == 5
    for row in content["compared"].values():
        assert row["rounds"] == 3 and row["images_per_s"] > 0 and row["disk_mib"] >= 0
    assert capsys.readouterr().out.count("MiB from the disk") == 4
    assert [path.name for path in out.parent.iterdir()] == ["r.json"]  # the images are gone


def test_a_folder_of_images_is_measured_warm(tmp_path):
    write_images(tmp_path / "images", [f"{i}.png" for i in range(3)])
    assert measure(tmp_path / "r.json", "--data", tmp_path / "images", "--warm") == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["num_images"] == 3 and content["options"]["warm"]


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    write_images(tmp_path / "images", ["0.png"])
    pack_folder(tmp_path / "images", tmp_path / "pack")
    assert measure(tmp_path / "r.json", "--data", tmp_path / "pack") == 2
    assert "is packed" in capsys.readouterr().err
    assert measure(tmp_path / "r.json", "--rounds", 2) == 2
    assert not (tmp_path / "r.json").exists()
