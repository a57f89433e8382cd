"""Weights files on disk: which are read, and that none runs code."""

from __future__ import annotations

import argparse
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from foreign_files import (
    barlow_twins,
    dino,
    lightly_benchmark,
    narrow_resnet,
    of_hugging_face,
    pixpro,
    vissl,
)
from safetensors.torch import save_file

from moco.errors import CheckpointError
from moco.models.backbone import build_backbone
from moco.training.checkpoint import save_checkpoint
from moco.training.layouts import find_source, read_backbone, read_weights
from moco.training.pickle_outline import how_to_keep_tensors


class Runs:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def refused(path: pathlib.Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "what, name",
    [
        (argparse.Namespace(lr=0.1), r"argparse\.Namespace"),
        (pathlib.PurePosixPath("x"), r"pathlib\S*\.PurePosixPath"),
        (np.float64(3), r"numpy\S*\.scalar"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_other_objects_are_refused_by_name_and_with_a_remedy(tmp_path, what, name, zipped):
    content = {"state_dict": {"a": torch.zeros(1)}, "args": what}
    torch.save(content, tmp_path / "f.ckpt", _use_new_zipfile_serialization=zipped)
    remedy = r"torch\.save\(\{'state_dict': .*\['state_dict'\]\}, OUT\)"
    refused(tmp_path / "f.ckpt", rf"first: {name}\).*could run code.*{remedy}")


def test_the_config_of_a_lightning_module_is_refused_by_name(tmp_path):
    """vturrisi/solo-learn and others keep an OmegaConf node among Lightning's hyper_parameters."""
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"lr": 0.1})
    torch.save({"state_dict": {}, "hyper_parameters": config}, tmp_path / "f.ckpt")
    refused(tmp_path / "f.ckpt", r"first: omegaconf\.dictconfig\.DictConfig")


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"state_dict": {}, "x": Runs(tmp_path / "made")}, tmp_path / "f.pth")
    refused(tmp_path / "f.pth", "posix.mkdir")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "f.pth", weights_only=False)  # the control: it would
    assert (tmp_path / "made").is_dir()


def a_module(state) -> torch.nn.Module:
    network = build_backbone("resnet18", num_classes=1, width=0.125)
    network.load_state_dict({**network.state_dict(), **state})
    return network


def odd(**beside) -> dict:
    return {"args": argparse.Namespace(lr=1), "epoch": 3, **beside}


# What people have; each holds the query encoder that `read_backbone` finds in the result.
PICKLED = {
    "Lightning": lambda q, k: lightly_benchmark(q, k) | odd(),
    "DINO": lambda q, k: dino(q, k) | odd(),
    "VISSL": lambda q, k: vissl(q, k) | odd(),
    "PixPro with its options": lambda q, k: pixpro(q, k) | {"opt": argparse.Namespace(lr=1)},
    "Barlow Twins with its optimizer": lambda q, k: barlow_twins(q, k)
    | {"optimizer": {"param_groups": [{"weight_decay_filter": os.path.join}]}},
    "a module": lambda q, k: a_module(q),
    "a wrapped module": lambda q, k: torch.nn.DataParallel(a_module(q)),
    "a module in a dict": lambda q, k: odd(model=a_module(q), optimizer=None),
    "a module under state_dict": lambda q, k: odd(state_dict=a_module(q)),
    "a state dict with more": lambda q, k: {**q, "args": argparse.Namespace(lr=1)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PICKLED)
def test_the_remedy_works_when_followed(tmp_path, name, zipped):
    query, key = narrow_resnet(seed=1), narrow_resnet(seed=2)
    file, out = tmp_path / "f.ckpt", tmp_path / "out.pth"
    torch.save(PICKLED[name](query, key), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        read_weights(file)
    words, _, remedy = str(caught.value).partition("keep the tensors alone: ")
    assert "\n" not in remedy and "could run code" in words
    assert ("it is a whole pickled module" in words) == (name in ("a module", "a wrapped module"))
    exec(remedy, {"torch": torch, "FILE": file, "OUT": out})
    state = read_backbone(read_weights(out)).state
    assert all(torch.equal(state[name], query[name]) for name in query)


def test_reading_how_to_keep_tensors_runs_nothing(tmp_path):
    for content in ({"state_dict": {"a": torch.zeros(1)}, "x": Runs(tmp_path / "made")},
                    Runs(tmp_path / "made")):  # fmt: skip
        torch.save(content, tmp_path / "f.pth")
        assert "torch.save" in how_to_keep_tensors(tmp_path / "f.pth")
        assert not (tmp_path / "made").exists()


def test_safetensors_are_read_with_their_metadata(tmp_path):
    state = narrow_resnet()
    save_file(state, tmp_path / "f.safetensors", {"arch": "resnet18", "format": "pt"})
    content = read_weights(tmp_path / "f.safetensors")
    assert (content["arch"], content["format"]) == ("resnet18", "pt")
    found = read_backbone(content)
    assert found.layout == "torchvision"
    assert all(torch.equal(found.state[name], state[name]) for name in state)
    save_file(state, tmp_path / "f.safetensors", {"arch": "resnet50"})
    with pytest.raises(CheckpointError, match="'arch' is resnet50, its tensors are a resnet18's"):
        read_backbone(read_weights(tmp_path / "f.safetensors"))


def test_damaged_and_missing_files_are_refused(tmp_path):
    save_file(narrow_resnet(), tmp_path / "f.safetensors")
    whole = (tmp_path / "f.safetensors").read_bytes()
    for data in (b"", whole[:-1], whole[:100], b"\xff" * 8 + whole[8:]):
        (tmp_path / "f.safetensors").write_bytes(data)
        refused(tmp_path / "f.safetensors", "is not a readable safetensors file")
    refused(tmp_path / "none.safetensors", "there is no such file")
    refused(tmp_path / "none.pth", "there is no such file")
    torch.save({"a": torch.zeros(1)}, tmp_path / "f.safetensors")
    refused(tmp_path / "f.safetensors", "is not a readable safetensors file")
    (tmp_path / "f.pth").write_bytes(whole)
    refused(tmp_path / "f.pth", "is not a readable checkpoint")


def test_a_run_folder_stands_for_its_newest_verified_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no verified checkpoint"):
        find_source(tmp_path)
    for epoch in range(2):
        save_checkpoint(tmp_path / f"checkpoint_{epoch:04d}.pth.tar", {"epoch": epoch}, step=epoch)
    newest = tmp_path / "checkpoint_0001.pth.tar"
    assert find_source(tmp_path) == (newest, [])
    newest.write_bytes(newest.read_bytes() + b"x")
    older, [(passed_over, reason)] = find_source(tmp_path)
    assert (older.name, passed_over) == ("checkpoint_0000.pth.tar", newest)
    assert "its manifest says" in reason
    with pytest.raises(CheckpointError, match="its manifest says"):
        find_source(newest)
    (tmp_path / "alone.pth").write_bytes(b"x")  # another project's file has no manifest
    assert find_source(tmp_path / "alone.pth") == (tmp_path / "alone.pth", [])


def test_hugging_faces_strides_are_read_beside_the_file(tmp_path):
    """configuration_resnet.py: downsample_in_first_stage, downsample_in_bottleneck; both False by
    default, which is torchvision's network."""
    path, state = tmp_path / "model.safetensors", narrow_resnet("resnet50")
    save_file(of_hugging_face(state), path, {"format": "pt"})
    config = {"model_type": "resnet", "downsample_in_first_stage": False, "hidden_act": "relu"}
    for changes in ({}, {"downsample_in_bottleneck": False}, {"model_type": "vit"}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        found = read_backbone(read_weights(path))
        assert (found.layout, found.network.arch) == ("huggingface", "resnet50")
        assert all(torch.equal(found.state[name], state[name]) for name in state)
    for key in ("downsample_in_first_stage", "downsample_in_bottleneck"):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: True}))
        refused(path, f"config.json beside it says {key} true: its strides are elsewhere")


def test_features_of_hugging_faces_network(tmp_path):
    """Where transformers is installed: its own network, saved as it saves, and torchvision's."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[3, 4, 6, 3]
    )
    theirs = transformers.ResNetModel(config).eval()
    theirs.save_pretrained(tmp_path)
    found = read_backbone(read_weights(tmp_path / "model.safetensors"))
    ours = build_backbone("resnet50", num_classes=1, width=0.125).eval()
    ours.load_state_dict({**ours.state_dict(), **found.state})
    images = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        wanted = theirs(images).pooler_output.flatten(1)
        torch.testing.assert_close(ours.forward_features(images), wanted, rtol=1e-5, atol=1e-6)
