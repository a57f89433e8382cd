"""The measurement of the data path, tiny: what it compares, counts and writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random

import numpy as np
import pytest
import torch
from scripts import load_tool

from moco.benchmarks import data, data_recipes
from moco.benchmarks.own_process import own_processes
from moco.benchmarks.pictures import natural_jpeg, natural_picture
from moco.data.augment import IMAGENET_MEAN, IMAGENET_STD


def measure(output, *arguments: str) -> dict:
    words = ["data", "--size", "24", "--rounds", "3", "--output", str(output), *arguments]
    with pytest.raises(SystemExit) as end:
        load_tool("benchmark").main(words)
    assert end.value.code == 0
    return json.loads(output.read_text())


def test_generated_pictures_are_like_photographs():
    pictures = [natural_picture(seed) for seed in range(4)]
    assert pictures[0].shape == (400, 500, 3) and pictures[0].dtype == np.uint8
    assert not (pictures[0] == pictures[1]).all()
    assert (pictures[1] == natural_picture(1)).all()
    for picture in pictures:
        assert 70 < picture.mean() < 170 and 35 < picture.std() < 85
    bits_a_pixel = np.mean([8 * len(natural_jpeg(seed)) / 200_000 for seed in range(4)])
    assert 3 < bits_a_pixel < 5.5  # ImageNet's files: about 4.3


def test_every_way_is_measured_in_one_process_and_through_workers(tmp_path, capsys):
    words = ["--images", "4", "--batch", "2", "--loader-batches", "1", "--workers", "1"]
    content = measure(tmp_path / "out" / "d.json", *words)
    out = capsys.readouterr().out
    assert "| opencv |" in out and "written: " in out
    one = content["one process, one thread"]
    assert set(one) - {"lightly"} == {
        "reference", "torchvision v2 on tensors", "pil", "opencv", "opencv, normalised",
        data.DEVICE, data.DECODE,
    }  # fmt: skip
    assert set(content["loader, 1 worker"]) == {"reference", "pil", "opencv", data.DEVICE}
    for name, row in one.items():
        assert row["rounds"] == 3 and row["pairs_per_s"] == pytest.approx(
            4 / row["median_s"], abs=0.06
        )
        assert row["speedup"] > 0 and (row["speedup"] == 1) == (name == "reference")
        assert (row["share_of_decoding"] == 1) == (name == data.DECODE)
    assert content["images"]["mean_pixels"] == 200_000
    assert {"command", "machine", "versions"} <= content.keys()
    assert {"opencv", "pillow"} <= content["versions"].keys()


def test_a_folder_of_images_is_measured(tmp_path, image_folder, capsys):
    words = ["--images", "4", "--batch", "4", "--data", str(image_folder), "--workers"]
    content = measure(tmp_path / "d.json", *words)
    assert content["images"] == {"kind": "a folder", "number": 4, "mean_pixels": 576,
                                 "mean_bytes": content["images"]["mean_bytes"]}  # fmt: skip
    assert "loader, 1 worker" not in content


@pytest.mark.parametrize(
    "words", [["--rounds", "2"], ["--images", "3", "--batch", "4"], ["--workers", "0"]]
)
def test_options_out_of_range_are_one_line(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        load_tool("benchmark").main(["data", "--output", str(tmp_path / "d.json"), *words])
    assert end.value.code == 2 and "3 rounds and 1 worker" in capsys.readouterr().err


def test_a_folder_with_too_few_images_is_one_line(tmp_path, image_folder, capsys):
    with pytest.raises(SystemExit) as end:
        load_tool("benchmark").main(
            ["data", "--data", str(image_folder), "--output", str(tmp_path / "d.json")]
        )
    assert (
        end.value.code == 2 and "holds 32 images, --images asks for 64" in capsys.readouterr().err
    )


def test_the_other_recipes_make_two_different_normalised_views():
    file = natural_jpeg(0, 100, 80)
    for build in (data_recipes.reference, data_recipes.torchvision_v2):
        random.seed(0)
        torch.manual_seed(0)
        first, second = build(32)(file)
        assert first.shape == second.shape == (3, 32, 32) and first.dtype == torch.float32
        assert not torch.equal(first, second)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        levels = (first * std + mean) * 255
        assert levels.min() > -0.01 and levels.max() < 255.01 and levels.std() > 5


def test_jobs_run_in_processes_of_their_own():
    def broken(number):
        raise ValueError(f"round {number}")

    def dies(number):
        os._exit(3)

    seen, others = [], set(multiprocessing.active_children())  # of tests before
    jobs = {
        "good": (seen.append, lambda: seen.append("prepared")),
        "broken": (broken, int),
        "dead": (dies, int),
    }
    with own_processes(jobs) as calls:
        calls["good"](1)
        calls["good"](2)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="^broken: ValueError: round 7$"):
                calls["broken"](7)
        with pytest.raises(RuntimeError, match="^dead: its process died$"):
            calls["dead"](0)
    assert seen == []  # nothing came back to this process
    assert not set(multiprocessing.active_children()) - others
