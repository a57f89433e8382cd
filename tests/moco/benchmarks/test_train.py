"""The measurement of the loop in small."""

import json

import pytest
from scripts import load_tool

TINY = ["MODEL.ARCH", "resnet18", "MODEL.WIDTH", "0.125", "MODEL.STEM", "cifar", "MODEL.DIM", "8",
        "MOCO.QUEUE_SIZE", "20", "DATA.SIZE", "16", "TRAIN.BATCH_SIZE", "4",
        "LOG.TENSORBOARD", "False"]  # fmt: skip


@pytest.fixture(autouse=True)
def allocator_as_it_was(monkeypatch):
    """The measurement sets this process up as training does; other tests measure its memory."""
    monkeypatch.setattr("moco.distributed._keep_freed_memory", lambda: None)


def status(*argv):
    try:
        return load_tool("benchmark").main([*map(str, argv)]) or 0
    except SystemExit as ended:
        return ended.code or 0


def test_loop_beside_its_parts(tmp_path, capsys, image_folder):
    path = tmp_path / "train.json"
    code = status(
        "train", "--data", image_folder, "--workers", 1, "--steps", 3, "--rounds", 3,
        "--threads", 1, "--output", path, "--set", *TINY,
    )  # fmt: skip
    assert code == 0
    results = json.loads(path.read_text())
    row, costs, startup = results["loops"]["1"], results["costs"], results["startup"]
    assert row["rounds"] == 3 and min(row["data_s"], row["step_s"], row["loop_s"]) > 0
    low, high = row["quartiles"]
    assert 0 < low <= row["loop_over_slower"] <= high
    assert row["images_per_s"] == pytest.approx(4 / row["loop_s"])
    steps = 50_000 // 4
    expected = costs["checkpoint_s"] / (steps * costs["step_s"])
    assert costs["checkpoint_share"] == pytest.approx(expected) and costs["writing_s"] > 0
    parts = startup["imports_s"] + startup["building_s"] + startup["first_step_s"]
    assert startup["total_s"] == pytest.approx(parts)
    assert "times the slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "2"], "--rounds 2: at least 3"),
        (["--workers", "0"], "--workers [0]: allowed are numbers of 1 or more"),
        (["--steps", "100"], "32 images; 800 are needed"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, image_folder, argv, message):
    path = tmp_path / "train.json"
    code = status("train", "--data", image_folder, *argv, "--output", path, "--set", *TINY)
    assert code == 2
    assert message in capsys.readouterr().err and not path.exists()
