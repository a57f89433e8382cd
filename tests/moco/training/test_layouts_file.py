"""Weights files on disk: which are read, and that none runs code."""

from __future__ import annotations

import argparse
import os
import pathlib

import numpy as np
import pytest
import torch
from foreign_files import lightly_benchmark, narrow_resnet
from safetensors.torch import save_file

from moco.errors import CheckpointError
from moco.training.checkpoint import save_checkpoint
from moco.training.layouts import find_source, read_backbone, read_weights


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


def test_the_remedy_works(tmp_path):
    query, key = narrow_resnet(seed=1), narrow_resnet(seed=2)
    content = lightly_benchmark(query, key) | {"hyper_parameters": argparse.Namespace(lr=1)}
    file, out = tmp_path / "f.ckpt", tmp_path / "out.pth"
    torch.save(content, file)
    refused(file, "argparse.Namespace")
    torch.save({"state_dict": torch.load(file, weights_only=False)["state_dict"]}, out)
    state = read_backbone(read_weights(out), encoder="key").state
    assert all(torch.equal(state[name], key[name]) for name in key)


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
