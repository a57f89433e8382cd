"""Other projects' checkpoints on their way into the detector."""

from __future__ import annotations

import json

import pytest
import torch
from foreign_files import FILES, moco_v3, narrow_resnet, small_vit, weights_of
from safetensors.torch import save_file
from scripts import load_tool

from detection.convert import convert_checkpoint, convert_state
from detection.keymap import to_detectron2
from moco.errors import CheckpointError

WITH_KEY = [name for name, (_, _, key, _) in FILES.items() if key]
READABLE = [name for name in FILES if name != "lightly, generator"]  # a CIFAR stem


@pytest.fixture(scope="module")
def encoders():
    return narrow_resnet("resnet50", seed=1), narrow_resnet("resnet50", seed=2)


def said_to_be(content: dict, arch: str) -> dict:
    return {**content, "arch": arch} if "arch" in content else content


def check(content: dict, wanted: dict, encoder: str) -> None:
    converted = convert_state(content, encoder=encoder)
    model = {to_detectron2(n): t for n, t in wanted.items() if "num_batches" not in n}
    assert list(converted.model) == list(model) and len(model) == 265
    assert all(torch.equal(converted.model[name], model[name]) for name in model)
    dropped = [name for names in converted.dropped.values() for name in names]
    assert sorted([*converted.names, *dropped]) == sorted(weights_of(content))
    assert len(converted.dropped["num_batches_tracked"]) == 53


@pytest.mark.parametrize("name", READABLE)
def test_every_layout(encoders, name):
    content = said_to_be(FILES[name][0](*encoders), "resnet50")
    check(content, encoders[0], "query")
    if name in WITH_KEY:
        check(content, encoders[1], "key")


def test_what_r50_c4_cannot_hold_is_refused(encoders):
    vit = moco_v3(small_vit(1), small_vit(2))
    with pytest.raises(CheckpointError, match="allowed: resnet18, resnet34, resnet50"):
        convert_state(vit)
    generator = FILES["lightly, generator"][0](*(narrow_resnet("resnet50", stem=3),) * 2)
    with pytest.raises(CheckpointError, match="CIFAR stem"):
        convert_state(generator)


def test_the_command_line_takes_the_key_encoder_of_a_safetensors_file(encoders, tmp_path, capsys):
    content = FILES["lightly, benchmark"][0](*encoders)
    save_file(content["state_dict"], tmp_path / "lightly.safetensors")
    words = [str(tmp_path / "lightly.safetensors"), str(tmp_path / "w.pth"), "--encoder", "key"]
    load_tool("convert_to_d2").main.__wrapped__(words)
    printed = capsys.readouterr().out
    for line in (
        "(lightly layout, key encoder, resnet50)", "mapped: 265 tensors",
        "dropped: 318 tensors, query encoder", "dropped: 53 tensors, num_batches_tracked",
    ):  # fmt: skip
        assert line in printed, line
    record = json.loads((tmp_path / "w.pth.conversion.json").read_text())
    assert (record["layout"]["name"], record["encoder"]) == ("lightly", "key")
    weight = torch.load(tmp_path / "w.pth", weights_only=True)["model"]["stem.conv1.weight"]
    assert torch.equal(weight, encoders[1]["conv1.weight"])


def test_a_file_with_other_objects_is_refused_with_a_remedy(tmp_path):
    torch.save({"state_dict": {}, "model": torch.nn.Linear(1, 1)}, tmp_path / "f.ckpt")
    with pytest.raises(CheckpointError, match=r"first: torch\.nn\S*\.Linear\).*keep the tensors"):
        convert_checkpoint(tmp_path / "f.ckpt", tmp_path / "w.pth")
    assert not (tmp_path / "w.pth").exists()
