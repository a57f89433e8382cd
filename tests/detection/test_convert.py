"""Conversion of checkpoints: what is mapped, dropped, refused, proven and written."""

from __future__ import annotations

import json
import pickletools
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from foreign_files import narrow_resnet

from detection import self_check as self_check_module
from detection.convert import convert_checkpoint, convert_state, identify_layout
from detection.keymap import ResNetShape, to_detectron2
from detection.safe_pickle import read_pickled_arrays
from detection.self_check import self_check, torchvision_features
from moco.errors import CheckpointError
from moco.training.checkpoint import save_checkpoint, sha256_of

TINY = ResNetShape(50, stem_out_channels=8, res2_out_channels=32, width_per_group=8)
TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_to_d2.py"


def backbone(shape: ResNetShape = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names; no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, size in shape.tensor_shapes().items():
        if len(size) == 4:
            scale = (2 / (size[1] * size[2] ** 2)) ** 0.5
            state[name] = scale * torch.randn(size, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            state[name] = 0.2 * torch.randn(size, generator=generator)
        else:
            state[name] = 0.5 + torch.rand(size, generator=generator)
    return state


def with_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(7)
        for name in state
        if name.endswith("running_var")
    }
    return {**state, **counters}


def moco_checkpoint(shape: ResNetShape = TINY, prefix: str = "module.") -> dict:
    """The reference's layout (facebookresearch/moco, main_moco.py)."""
    state = {}
    for encoder, seed in (("encoder_q", 0), ("encoder_k", 1)):
        parts = with_counters(backbone(shape, seed))
        parts |= {f"fc.{i}.{kind}": torch.ones(2) for i in (0, 2) for kind in ("weight", "bias")}
        state |= {f"{prefix}{encoder}.{name}": value for name, value in parts.items()}
    state[f"{prefix}queue"] = torch.zeros(4, 8)
    state[f"{prefix}queue_ptr"] = torch.zeros(1, dtype=torch.long)
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}}}


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "checkpoint_0199.pth.tar"
    torch.save(moco_checkpoint(), path)
    return path


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_references_checkpoint(prefix):
    checkpoint = moco_checkpoint(prefix=prefix)
    converted = convert_state(checkpoint)
    assert converted.layout == ("moco", f"{prefix}encoder_q.")
    assert converted.shape == TINY
    counts = {group: len(names) for group, names in converted.dropped.items()}
    assert counts == {
        "num_batches_tracked": 53,
        "fc": 4,
        "key encoder": 265 + 53 + 4,
        "queue": 1,
        "queue_ptr": 1,
    }
    assert len(converted.names) == len(converted.model) == 265
    dropped = [name for names in converted.dropped.values() for name in names]
    assert sorted([*converted.names, *dropped]) == sorted(checkpoint["state_dict"])
    for source, target in converted.names.items():
        assert torch.equal(converted.model[target], checkpoint["state_dict"][source])


def test_the_query_encoder_is_taken_and_not_the_keys():
    converted = convert_state(moco_checkpoint())
    name = "layer1.0.conv1.weight"
    assert torch.equal(converted.source[name], backbone(seed=0)[name])
    assert not torch.equal(converted.source[name], backbone(seed=1)[name])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
def test_a_torchvision_resnet50(wrap):
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    converted = convert_state(wrap(network.state_dict()))
    assert converted.layout == ("torchvision", "")
    assert {group: len(n) for group, n in converted.dropped.items()} == {
        "num_batches_tracked": 53,
        "fc": 2,
    }
    assert len(converted.model) == 265 and converted.shape == ResNetShape()


@pytest.mark.parametrize("depth", [18, 50])
def test_the_functional_oracle_is_torchvisions_network(depth):
    torch.manual_seed(0)
    network = torchvision.models.get_model(f"resnet{depth}").eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    image = torch.randn(1, 3, 75, 109)
    wanted, hooks = {}, []
    for stage in range(1, 5):
        hooks.append(
            network.get_submodule(f"layer{stage}").register_forward_hook(
                lambda _m, _i, output, at=f"res{stage + 1}": wanted.update({at: output})
            )
        )
    with torch.no_grad():
        network(image)
        given = torchvision_features(network.state_dict(), image, depth)
    assert wanted.keys() == given.keys()
    assert all(torch.equal(wanted[name], given[name]) for name in wanted)


def test_self_check_accepts_a_right_conversion():
    converted = convert_state(backbone())
    figures = self_check(converted.source, converted.model, converted.shape)
    assert figures["max_relative_difference"] <= 1e-6


@pytest.mark.parametrize(
    "first, second",
    [
        ("res2.1.conv1.norm.running_mean", "res2.2.conv1.norm.running_mean"),
        ("res3.1.conv2.norm.running_var", "res3.2.conv2.norm.running_var"),
        ("res5.1.conv3.norm.bias", "res5.2.conv3.norm.bias"),
        ("res4.3.conv2.weight", "res4.4.conv2.weight"),
        ("res2.0.shortcut.norm.weight", "res2.0.conv3.norm.weight"),
    ],
)
def test_self_check_catches_a_swapped_pair(first, second):
    converted = convert_state(backbone())
    model = dict(converted.model)
    model[first], model[second] = model[second], model[first]
    with pytest.raises(CheckpointError, match="self-check failed"):
        self_check(converted.source, model, converted.shape)


def test_self_check_catches_the_stride_in_the_other_convolution(monkeypatch):
    converted = convert_state(backbone())
    build = self_check_module.feature_trunk

    def stride_in_1x1(cfg):
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
        return build(cfg)

    monkeypatch.setattr(self_check_module, "feature_trunk", stride_in_1x1)
    with pytest.raises(CheckpointError, match="self-check failed.*res3"):
        self_check(converted.source, converted.model, converted.shape)


def test_self_check_refuses_a_dead_network():
    converted = convert_state({name: torch.zeros_like(t) for name, t in backbone().items()})
    with pytest.raises(CheckpointError, match="all zero"):
        self_check(converted.source, converted.model, converted.shape)


def test_self_check_draws_no_global_random_number():
    converted = convert_state(backbone())
    before = torch.get_rng_state()
    self_check(converted.source, converted.model, converted.shape)
    assert torch.equal(before, torch.get_rng_state())


def test_pth_and_pkl_hold_the_same(checkpoint_file, tmp_path):
    report = convert_checkpoint(checkpoint_file, tmp_path / "w.pth")
    convert_checkpoint(checkpoint_file, tmp_path / "w.pkl")
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    arrays, fields = read_pickled_arrays(tmp_path / "w.pkl")
    assert {"__author__": content["__author__"], "matching_heuristics": True} == fields
    assert content["matching_heuristics"] is True and content["__author__"] != "Caffe2"
    assert list(content["model"]) == list(arrays) == list(report.names.values())
    for name, tensor in content["model"].items():
        assert arrays[name].dtype == np.float32
        assert np.array_equal(tensor.numpy(), arrays[name])


def test_pkl_names_no_module_that_numpy_1_lacks(checkpoint_file, tmp_path):
    convert_checkpoint(checkpoint_file, tmp_path / "w.pkl")
    operations = list(pickletools.genops((tmp_path / "w.pkl").read_bytes()))
    names = {argument for opcode, argument, _ in operations if "GLOBAL" in opcode.name}
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    assert max(opcode.proto for opcode, _, _ in operations) <= 3


def test_the_conversion_record(checkpoint_file, tmp_path):
    out = tmp_path / "deep" / "w.pth"
    report = convert_checkpoint(checkpoint_file, out)
    record = json.loads((tmp_path / "deep" / "w.pth.conversion.json").read_text())
    assert record["source"] == "checkpoint_0199.pth.tar"
    assert record["source_sha256"] == sha256_of(checkpoint_file)
    assert record["output_sha256"] == sha256_of(out) == report.out_sha256
    assert record["num_mapped"] == len(record["mapped"]) == 265
    assert record["mapped"]["module.encoder_q.bn1.bias"] == "stem.conv1.norm.bias"
    assert record["num_dropped"] == sum(map(len, record["dropped"].values())) == 381
    assert record["self_check"]["max_relative_difference"] <= 1e-5
    assert (record["arch"], record["stem_out_channels"]) == ("resnet50", 8)
    assert record["yaml"] == report.yaml_lines
    assert record["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(record)


def test_the_same_source_gives_the_same_bytes(checkpoint_file, tmp_path):
    for suffix in ("pth", "pkl"):
        first = convert_checkpoint(checkpoint_file, tmp_path / f"a.{suffix}").out_sha256
        assert first == convert_checkpoint(checkpoint_file, tmp_path / f"b.{suffix}").out_sha256


def test_yaml_lines(checkpoint_file, tmp_path):
    lines = convert_checkpoint(checkpoint_file, tmp_path / "w.pth").yaml_lines
    assert lines == [
        "INPUT:",
        '  FORMAT: "RGB"',
        "MODEL:",
        "  PIXEL_MEAN: [123.675, 116.28, 103.53]",
        "  PIXEL_STD: [58.395, 57.12, 57.375]",
        "  RESNETS:",
        "    STRIDE_IN_1X1: False",
        "    STEM_OUT_CHANNELS: 8",
        "    RES2_OUT_CHANNELS: 32",
        "    WIDTH_PER_GROUP: 8",
    ]


def test_pixel_statistics_of_the_pretraining_config(tmp_path):
    data = {"MEAN": [0.5, 0.25, 0.1], "STD": [0.2, 0.2, 0.4]}
    checkpoint = {**moco_checkpoint(), "extra": {"config": {"DATA": data}}}
    torch.save(checkpoint, tmp_path / "c.pth.tar")
    lines = convert_checkpoint(tmp_path / "c.pth.tar", tmp_path / "w.pth").yaml_lines
    assert "  PIXEL_MEAN: [127.5, 63.75, 25.5]" in lines
    assert "  PIXEL_STD: [51.0, 51.0, 102.0]" in lines
    torch.save({**checkpoint, "extra": {"config": {}}}, tmp_path / "c.pth.tar")
    with pytest.raises(CheckpointError, match="DATA.MEAN"):
        convert_checkpoint(tmp_path / "c.pth.tar", tmp_path / "w.pth")


def test_a_run_folder_gives_its_newest_verified_checkpoint(tmp_path):
    for epoch, step in ((0, 10), (1, 20)):
        save_checkpoint(tmp_path / f"checkpoint_{epoch:04d}.pth.tar", moco_checkpoint(), step=step)
    report = convert_checkpoint(tmp_path, tmp_path / "w.pth")
    assert (report.source.name, report.refused) == ("checkpoint_0001.pth.tar", [])
    with open(tmp_path / "checkpoint_0001.pth.tar", "ab") as file:
        file.write(b"x")
    report = convert_checkpoint(tmp_path, tmp_path / "w.pth")
    assert report.source.name == "checkpoint_0000.pth.tar"
    assert [path.name for path, _ in report.refused] == ["checkpoint_0001.pth.tar"]
    with pytest.raises(CheckpointError, match="its manifest says"):
        convert_checkpoint(tmp_path / "checkpoint_0001.pth.tar", tmp_path / "w.pth")


def refused(content: object, tmp_path: Path, match: str, out: str = "w.pth") -> None:
    """Converting `content` fails with one line, and leaves an existing output as it was."""
    torch.save(content, tmp_path / "source.pth.tar")
    (tmp_path / out).write_bytes(b"old")
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_checkpoint(tmp_path / "source.pth.tar", tmp_path / out)
    assert "\n" not in str(caught.value)
    assert (tmp_path / out).read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source.pth.tar", out])


def test_unknown_layouts_are_refused_with_their_first_keys(tmp_path):
    vit = {"module.base_encoder.cls_token": torch.zeros(1), "b": torch.zeros(1)}
    refused({"state_dict": vit}, tmp_path, "first keys: 'module.base_encoder.cls_token', 'b'")
    refused({"stem.conv1.weight": torch.zeros(1)}, tmp_path, "first keys: 'stem.conv1.weight'")
    refused({}, tmp_path, "first keys: none")
    refused([1, 2], tmp_path, "no dict of named tensors")
    refused({1: torch.zeros(1)}, tmp_path, "no dict of named tensors")


def test_an_unexplained_key_is_refused(tmp_path):
    for name in ("module.bank2", "module.queue_ptr2", "stray", "module.encoder_q.head.weight"):
        checkpoint = moco_checkpoint()
        checkpoint["state_dict"][name] = torch.zeros(1)
        refused(checkpoint, tmp_path, name.removeprefix("module.encoder_q."))


def test_damaged_weights_are_refused(tmp_path):
    checkpoint = moco_checkpoint()
    checkpoint["state_dict"]["module.encoder_q.layer3.2.bn1.running_var"][3] = float("nan")
    refused(checkpoint, tmp_path, r"encoder_q\.layer3\.2\.bn1\.running_var' holds NaN")
    checkpoint = moco_checkpoint()
    del checkpoint["state_dict"]["module.encoder_q.layer3.2.bn1.running_var"]
    refused(checkpoint, tmp_path, r"missing: layer3\.2\.bn1\.running_var")
    checkpoint["state_dict"]["module.encoder_q.layer3.2.bn1.running_var"] = torch.zeros(8).long()
    refused(checkpoint, tmp_path, "no tensor of floats")
    refused({**moco_checkpoint(), "arch": "resnet101"}, tmp_path, "'arch' is resnet101")


@pytest.mark.parametrize("arch, count", [("resnet18", 20 * 5), ("resnet34", 36 * 5)])
def test_basic_blocks_are_converted_and_a_swap_of_two_tensors_is_seen(arch, count, tmp_path):
    torch.save(narrow_resnet(arch), tmp_path / "source.pth")
    report = convert_checkpoint(tmp_path / "source.pth", tmp_path / "out.pth")
    assert (report.shape.arch, len(report.names)) == (arch, count)
    assert report.self_check["max_relative_difference"] <= 1e-6
    lines = [line.strip() for line in report.yaml_lines]
    width = report.shape.res2_out_channels
    assert f"DEPTH: {report.shape.depth}" in lines and f"RES2_OUT_CHANNELS: {width}" in lines
    assert not any("WIDTH_PER_GROUP" in line for line in lines)
    converted = convert_state(narrow_resnet(arch))
    model = dict(converted.model)
    first, second = "res4.0.conv2.weight", "res4.1.conv2.weight"
    model[first], model[second] = model[second], model[first]
    with pytest.raises(CheckpointError, match="self-check failed, the converted res4 differs"):
        self_check(converted.source, model, converted.shape)


def test_a_key_encoder_with_nan_is_no_obstacle(tmp_path):
    checkpoint = moco_checkpoint()
    checkpoint["state_dict"]["module.encoder_k.bn1.bias"][0] = float("nan")
    assert len(convert_state(checkpoint).model) == 265


def test_half_and_channels_last_sources_become_plain_float32():
    state = {n: t.half() for n, t in backbone().items()}
    state["conv1.weight"] = state["conv1.weight"].to(memory_format=torch.channels_last)
    model = convert_state(state).model
    assert {t.dtype for t in model.values()} == {torch.float32}
    assert all(t.is_contiguous() for t in model.values())


def test_output_and_source_paths_are_checked(checkpoint_file, tmp_path):
    with pytest.raises(CheckpointError, match=r"'\.tar'; allowed: \.pth"):
        convert_checkpoint(checkpoint_file, tmp_path / "w.pth.tar")
    (tmp_path / "w.pth").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="there is no such file"):
        convert_checkpoint(tmp_path / "none.pth.tar", tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no verified checkpoint"):
        convert_checkpoint(tmp_path, tmp_path / "w.pth")
    torch.save(backbone(), tmp_path / "same.pth")
    with pytest.raises(CheckpointError, match="source itself"):
        convert_checkpoint(tmp_path / "same.pth", tmp_path / "same.pth")


def test_a_failed_self_check_writes_nothing(monkeypatch, tmp_path):
    # The functions that name tensors are wrong in the same way: only the self-check can tell.
    def swapped(name: str) -> str:
        pair = {"layer4.1.bn1.bias": "layer4.2.bn1.bias", "layer4.2.bn1.bias": "layer4.1.bn1.bias"}
        return to_detectron2(pair.get(name, name))

    monkeypatch.setattr("detection.convert.to_detectron2", swapped)
    refused(moco_checkpoint(), tmp_path, "self-check failed.*res5.*nothing was written")


def test_layout_of_a_state_dict_alone():
    assert identify_layout(moco_checkpoint()["state_dict"]).prefix == "module.encoder_q."
    assert identify_layout({f"module.{n}": t for n, t in backbone().items()}).prefix == "module."


def test_the_command_line_from_another_folder(checkpoint_file, tmp_path):
    command = [sys.executable, str(TOOL), str(checkpoint_file), "w.pkl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in (
        "mapped: 265 tensors",
        "dropped: 322 tensors, key encoder",
        f"sha256 {sha256_of(tmp_path / 'w.pkl')}",
        "    STRIDE_IN_1X1: False",
        "self-check on a random 101x139 image",
    ):
        assert line in done.stdout, line


def test_the_command_line_reports_errors_in_one_line(tmp_path, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nowhere"), str(tmp_path / "w.pkl")])
    output = capsys.readouterr()
    assert (caught.value.code, output.out) == (2, "")
    assert output.err.startswith(f"error: {tmp_path / 'nowhere'}: ")
    assert output.err.count("\n") == 1
