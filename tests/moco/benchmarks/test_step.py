"""The measurement of a step in small: sides, peak, counted operations, JSON."""

import json

import pytest
import torch
from scripts import load_tool

from moco.benchmarks.peak import matrix_peak
from moco.benchmarks.step import CASES, Options, measure_case, step_flops
from moco.benchmarks.step_profile import group_of, profile
from moco.config import load_pretrain_config
from moco.errors import ConfigError

TINY = ["MODEL.WIDTH", "0.125", "MODEL.DIM", "8", "TRAIN.BATCH_SIZE", "16", "MOCO.QUEUE_SIZE", "64"]


def status(*argv):
    try:
        return load_tool("benchmark").main([*map(str, argv)]) or 0
    except SystemExit as ended:
        return ended.code or 0


def test_sides_in_turns(tmp_path, capsys):
    path = tmp_path / "step.json"
    sides = ("reference", "TRAIN.REFERENCE", "float32", "fast")
    code = status(
        "step", "--cases", "r18_cifar", "--sides", *sides, "--rounds", 3, "--profile", 1,
        "--peak-side", 128, "--threads", 1, "--output", path, "--set", *TINY,
    )  # fmt: skip
    assert code == 0
    results = json.loads(path.read_text())
    case = results["cases"]["r18_cifar"]
    assert list(case["sides"]) == list(sides) and case["baseline"] == "reference"
    assert case["threads"] == 1 and case["batch"] == 16
    for name, row in case["sides"].items():
        assert row["rounds"] == 3 and row["median_s"] > 0 and row["images_per_s"] > 0
        assert row["peak_memory_bytes"] > 2**20
        peak = results["peak_flops_per_s"][row["precision"]]["best"]
        expected = case["flops"] / row["median_s"] / peak
        assert row["share_of_peak"] == pytest.approx(expected)
        assert case["profile"][name]["convolution backward"] > 0
    assert case["sides"]["reference"]["precision"] == "float32"
    out = capsys.readouterr().out
    assert "**r18_cifar**" in out and "| fast | " in out and "share of its peak" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "2"], "--rounds 2: at least 3"),
        (["--set", "METHOD", "memory_bank"], "side 'reference': METHOD is 'memory_bank'"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, argv, message):
    path = tmp_path / "step.json"
    argv = ["step", "--cases", "r18_cifar", "--peak-side", "64", "--output", path, *argv]
    assert status(*argv) == 2
    assert message in capsys.readouterr().err and not path.exists()


def test_a_side_that_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = Options(sides=("lightly", "TRAIN.REFERENCE"), num_rounds=3, threads=1)
    peaks = {"float32": {"best": 1e9}, "bfloat16": {"best": 1e9}}
    found = measure_case([*CASES["r18_cifar"], *TINY], options, peaks)
    assert list(found["sides"]) == ["TRAIN.REFERENCE"] and found["baseline"] == "TRAIN.REFERENCE"
    assert "lightly is left out: lightly is not installed" in capsys.readouterr().out


def test_counted_operations():
    """ResNet-50 at 224 pixels: 4.09 billion multiplications a forward, torchvision's figure; the
    step is query forward, backward (twice that, less the first convolution's input), key forward.
    """
    words = ["TRAIN.BATCH_SIZE", "2", "MOCO.QUEUE_SIZE", "16", "MODEL.HEAD", "linear"]
    flops = step_flops(load_pretrain_config(None, words))
    first = 2 * 2 * 112 * 112 * 64 * 3 * 49
    assert flops == pytest.approx(2 * 2 * 4 * 4.089e9 - first, rel=2e-3)
    double = step_flops(load_pretrain_config(None, [*words[2:], "TRAIN.BATCH_SIZE", "4"]))
    assert double == 2 * flops


def test_peak_is_the_better_of_both():
    found = matrix_peak(torch.float32, torch.device("cpu"), side=64, rounds=2)
    assert found["best"] == max(found["matrix product"], found["convolution"]) > 1e6


def test_profile_has_all_the_time():
    layer = torch.nn.Conv2d(3, 8, 3)
    images = torch.randn(2, 3, 16, 16)
    groups = profile(lambda: layer(images).relu().sum().backward(), torch.device("cpu"))
    assert groups["convolution backward"] > 0 and groups["ReLU"] > 0 and groups["rest"] >= 0
    assert group_of("aten::mkldnn_convolution") == "convolution forward"
    assert group_of("aten::something_new") == "rest"


def test_unknown_names_are_refused(tmp_path):
    from moco.benchmarks import step

    with pytest.raises(ConfigError, match="--cases r51: allowed are r50_112"):
        step.run(Options(cases=("r51",)), output=tmp_path / "x.json")
