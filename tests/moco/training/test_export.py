"""Exports: what other libraries load, that it is the source's network, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torchvision
from foreign_files import moco, moco_v3, narrow_resnet, small_vit, vissl
from safetensors import safe_open
from scripts import load_tool

from moco.errors import CheckpointError
from moco.models.backbone import build_backbone
from moco.training import export, export_check
from moco.training.checkpoint import save_checkpoint, sha256_of
from moco.training.export import export_backbone
from moco.training.export_check import network_for
from moco.training.layouts import ResNet, read_backbone, read_weights

IMAGE = torch.randn(1, 3, 65, 71, generator=torch.Generator().manual_seed(1))


def torchvisions(arch: str, seed: int, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    network = torchvision.models.get_model(arch, **options).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def backbone_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}


def features(network: torch.nn.Module) -> torch.Tensor:
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        return network(IMAGE)


@pytest.fixture(scope="module")
def pair():
    """Two ResNet-18 of torchvision's own."""
    return torchvisions("resnet18", 1), torchvisions("resnet18", 2)


@pytest.fixture(scope="module")
def source(pair, tmp_path_factory):
    """A checkpoint of the reference's layout with them as query and key encoder."""
    path = tmp_path_factory.mktemp("source") / "checkpoint_0199.pth.tar"
    torch.save(moco(*map(backbone_of, pair)), path)
    return path


@pytest.fixture
def narrow(tmp_path):
    path = tmp_path / "narrow.pth"
    torch.save(moco(narrow_resnet(seed=1), narrow_resnet(seed=2)), path)
    return path


def record_of(out) -> dict:
    return json.loads(export.report_path(out).read_text())


@pytest.mark.parametrize("encoder", ["query", "key"])
def test_torchvision_loads_it(source, pair, tmp_path, encoder):
    out = tmp_path / "w.pth"
    done = export_backbone(source, out, form="torchvision", encoder=encoder)
    network = torchvision.models.resnet18().eval()
    absent = network.load_state_dict(torch.load(out, weights_only=True), strict=False)
    record = record_of(out)
    assert absent.missing_keys == record["missing_there"] == ["fc.weight", "fc.bias"]
    assert absent.unexpected_keys == []
    wanted, other = pair if encoder == "query" else pair[::-1]
    assert torch.equal(features(network), features(wanted))
    assert not torch.equal(features(network), features(other))
    assert record["network"] == "torchvision.models.resnet18()"
    assert record["self_check"]["file_network"] == "torchvision.models.resnet.ResNet"
    assert record["self_check"]["bitwise_equal"] is True and done.is_new


def test_safetensors_say_what_they_are(source, pair, tmp_path):
    out = tmp_path / "w.safetensors"
    export_backbone(source, out, form="safetensors")
    wanted = backbone_of(pair[0])
    with safe_open(out, framework="pt") as file:
        assert set(file.keys()) == set(wanted)
        assert all(torch.equal(file.get_tensor(name), wanted[name]) for name in wanted)
        metadata = file.metadata()
    assert metadata == {
        "format": "pt", "arch": "resnet18", "layout": "moco", "encoder": "query",
        "names": "torchvision", "planes": "64", "stem": "imagenet",
        "source_sha256": sha256_of(source),
    }  # fmt: skip
    assert read_backbone(read_weights(out)).layout == "torchvision"


def test_timm_loads_it(source, pair, tmp_path):
    timm = pytest.importorskip("timm")
    out = tmp_path / "w.pth"
    export_backbone(source, out, form="timm")
    record = record_of(out)
    assert record["self_check"]["file_network"] == "timm.models.resnet.ResNet"
    network = timm.create_model("resnet18", num_classes=0).eval()
    network.load_state_dict(torch.load(out, weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(network(IMAGE), features(pair[0]))


def test_timm_loads_our_vit(tmp_path):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    torch.save(moco_v3(small_vit(1), small_vit(2)), tmp_path / "vit.pth")
    export_backbone(tmp_path / "vit.pth", tmp_path / "w.pth", form="timm", encoder="key")
    record = record_of(tmp_path / "w.pth")
    assert record["num_heads"] == 12 and record["missing_there"] == []
    assert "VisionTransformer" in record["self_check"]["file_network"]
    call = record["network"].removeprefix("timm.models.vision_transformer.")
    network = eval(call, {"VisionTransformer": vision_transformer.VisionTransformer})
    network.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
    assert torch.equal(network.blocks[1].mlp.fc2.bias, small_vit(2)["blocks.1.mlp.fc2.bias"])


def test_without_timm_its_file_is_checked_in_another_network(source, tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(export_check.importlib, "import_module", absent)
    export_backbone(source, tmp_path / "w.pth", form="timm")
    record = record_of(tmp_path / "w.pth")
    assert record["network"] == "timm.create_model('resnet18', num_classes=0)"
    assert record["self_check"]["file_network"] == "torchvision.models.resnet.ResNet"


def test_the_record_covers_the_source(narrow, tmp_path):
    out = tmp_path / "deep" / "w.pth"
    export_backbone(narrow, out, form="torchvision")
    record = record_of(out)
    names = torch.load(narrow, weights_only=True)["state_dict"]
    assert record["num_mapped"] == len(record["mapped"]) == 120
    assert record["num_dropped"] == sum(map(len, record["dropped"].values()))
    assert record["num_mapped"] + record["num_dropped"] == len(names)
    assert {k: len(v) for k, v in record["dropped"].items()} == {
        "fc": 3, "key encoder": 123, "queue": 1, "queue_ptr": 1
    }  # fmt: skip
    assert record["mapped"]["module.encoder_q.bn1.bias"] == "bn1.bias"
    assert (record["source"], record["source_sha256"]) == ("narrow.pth", sha256_of(narrow))
    assert record["output_sha256"] == sha256_of(out)
    assert str(tmp_path) not in json.dumps(record)
    assert list(torch.load(out, weights_only=True)) == list(narrow_resnet())


def test_a_narrow_network_is_this_projects(narrow, tmp_path):
    export_backbone(narrow, tmp_path / "w.pth", form="torchvision")
    record = record_of(tmp_path / "w.pth")
    assert record["network"] == (
        "moco.models.backbone.ResNet(BasicBlock, (2, 2, 2, 2), num_classes=1, width=0.125, "
        "stem='imagenet')"
    )
    network = build_backbone("resnet18", num_classes=1, width=0.125)
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    absent = network.load_state_dict(state, strict=False)
    assert absent.missing_keys == record["missing_there"] and absent.unexpected_keys == []


def test_a_cifar_stem_in_torchvisions_network(tmp_path):
    network = torchvisions("resnet18", 3)
    network.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    torch.save(network.state_dict(), tmp_path / "cifar.pth")
    export_backbone(tmp_path / "cifar.pth", tmp_path / "w.pth", form="torchvision")
    record = record_of(tmp_path / "w.pth")
    assert record["network"] == "torchvision.models.resnet18(), conv1 3x3 of stride 1, no maxpool"
    assert record["self_check"]["source_network"] == "moco.models.backbone.ResNet"
    assert record["self_check"]["file_network"] == "torchvision.models.resnet.ResNet"
    with pytest.raises(CheckpointError, match="timm has no resnet18 of 64 planes.*3x3"):
        export_backbone(tmp_path / "cifar.pth", tmp_path / "t.pth", form="timm")


def test_pixels_of_the_pretraining_config(narrow, tmp_path):
    content = torch.load(narrow, weights_only=True)
    data = {"SIZE": 32, "MEAN": [0.5, 0.4, 0.3], "STD": [0.2, 0.2, 0.2], "RECIPE": "v2"}
    torch.save({**content, "extra": {"config": {"DATA": data}}}, tmp_path / "ours.pth")
    for source, wanted in (
        (tmp_path / "ours.pth", {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}),
        (narrow, None),
    ):
        export_backbone(source, tmp_path / "w.pth", form="torchvision", overwrite=True)
        assert record_of(tmp_path / "w.pth")["pixels"] == wanted


def test_the_same_source_gives_the_same_bytes(narrow, tmp_path):
    for name in ("a", "b"):
        export_backbone(narrow, tmp_path / f"{name}.pth", form="torchvision")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    export_backbone(narrow, tmp_path / "a.safetensors", form="safetensors")
    # The library orders its metadata anew in every process.
    command = [sys.executable, load_tool("export").__file__, str(narrow)]
    command += [str(tmp_path / "b.safetensors"), "--format", "safetensors"]
    subprocess.run(command, check=True, capture_output=True)
    first, again = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert first.read_bytes() == again.read_bytes()


def test_other_content_is_only_replaced_when_told_so(narrow, tmp_path):
    out = tmp_path / "w.pth"
    export_backbone(narrow, out, form="torchvision")
    written = out.stat().st_mtime_ns
    assert not export_backbone(narrow, out, form="torchvision").is_new
    assert out.stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match="exists and holds other bytes; add --overwrite"):
        export_backbone(narrow, out, form="torchvision", encoder="key")
    assert record_of(out)["encoder"] == "query" and out.stat().st_mtime_ns == written
    assert export_backbone(narrow, out, form="torchvision", encoder="key", overwrite=True).is_new
    assert record_of(out)["encoder"] == "key"
    assert record_of(out)["output_sha256"] == sha256_of(out)


def exchanged(first: str, second: str):
    def change(state):
        return {**state, first: state[second], second: state[first]}

    return change


@pytest.mark.parametrize("form", ["torchvision", "safetensors"])
@pytest.mark.parametrize(
    "change, message",
    [
        (exchanged("layer1.0.bn1.running_mean", "layer1.1.bn1.running_mean"), "features.*differ"),
        (exchanged("layer4.0.conv2.weight", "layer4.1.conv2.weight"), "features.*differ"),
        (lambda state: {**state, "bn1.bias": state["bn1.bias"] + 1e-6}, "features.*differ"),
        (lambda state: {n: t for n, t in state.items() if n != "bn1.bias"}, "Missing key.*bn1"),
    ],
)
def test_negative_control_a_wrong_file_is_never_written(
    narrow, tmp_path, monkeypatch, form, change, message
):
    serialise = export.serialise

    def wrong(backbone, form, source_sha256):
        state = change(backbone.state)
        return serialise(type(backbone)(**{**vars(backbone), "state": state}), form, source_sha256)

    monkeypatch.setattr(export, "serialise", wrong)
    out = tmp_path / f"w{export.SUFFIXES[form]}"
    with pytest.raises(CheckpointError, match=message):
        export_backbone(narrow, out, form=form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow.pth"]


def test_a_dead_network_is_refused(tmp_path):
    dead = {name: torch.zeros_like(tensor) for name, tensor in narrow_resnet().items()}
    torch.save(dead, tmp_path / "dead.pth")
    with pytest.raises(CheckpointError, match="all zero"):
        export_backbone(tmp_path / "dead.pth", tmp_path / "w.pth", form="torchvision")


def test_no_global_random_number_is_drawn(narrow, tmp_path):
    before = torch.get_rng_state()
    export_backbone(narrow, tmp_path / "w.pth", form="torchvision")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "content, form, options, message",
    [
        (small_vit(), "torchvision", {}, "torchvision's ViTs have other names"),
        (small_vit(), "safetensors", {}, "number of heads of this .* is in no tensor; add --num-h"),
        (small_vit(), "safetensors", {"num_heads": 7}, "7 heads do not divide 24 channels"),
        (narrow_resnet(), "timm", {}, "timm has no resnet18 of 8 planes"),
        ({"a": torch.zeros(1)}, "timm", {}, "unknown layout, first keys: 'a'"),
        (narrow_resnet(), "torchvision", {"encoder": "key"}, "holds no key encoder"),
    ],
)
def test_refusals(tmp_path, content, form, options, message):
    torch.save(content, tmp_path / "s.pth")
    out = tmp_path / f"w{export.SUFFIXES[form]}"
    with pytest.raises(CheckpointError, match=message) as caught:
        export_backbone(tmp_path / "s.pth", out, form=form, **options)
    assert "\n" not in str(caught.value) and not out.exists()


def test_heads_survive_in_safetensors(tmp_path):
    torch.save(small_vit(), tmp_path / "s.pth")
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    export_backbone(tmp_path / "s.pth", first, form="safetensors", num_heads=4)
    export_backbone(first, second, form="safetensors")
    assert record_of(second)["num_heads"] == 4 and record_of(second)["layout"] == "timm"


def test_paths_are_checked(narrow, tmp_path):
    with pytest.raises(CheckpointError, match=r"'\.bin'; format torchvision writes \.pth"):
        export_backbone(narrow, tmp_path / "w.bin", form="torchvision")
    with pytest.raises(CheckpointError, match="is the source itself"):
        export_backbone(narrow, narrow, form="torchvision", overwrite=True)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match="is no file"):
        export_backbone(narrow, tmp_path / "folder.pth", form="torchvision", overwrite=True)


def test_the_command_line_on_a_run_folder(tmp_path, capsys):
    content = vissl(narrow_resnet(seed=1), narrow_resnet(seed=2))
    save_checkpoint(tmp_path / "checkpoint_0000.pth.tar", content, step=1)
    (tmp_path / "checkpoint_0001.pth.tar").write_bytes(b"unfinished")
    main = load_tool("export").main
    words = [str(tmp_path), str(tmp_path / "w.pth"), "--format", "torchvision", "--encoder", "key"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    for line in (
        "passed over: ", "(vissl layout, key encoder, resnet18)", "mapped: 120 tensors",
        "dropped: 120 tensors, query encoder", "dropped: 2 tensors, heads", "bitwise equal",
        f"wrote: {tmp_path / 'w.pth'} (sha256 {sha256_of(tmp_path / 'w.pth')})",
        "of its tensors the file lacks fc.weight, fc.bias",
    ):  # fmt: skip
        assert line in printed, line
    with pytest.raises(SystemExit):
        main(words)
    assert "unchanged, holds these bytes already: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([*words[:-1], "query"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "network, form, call",
    [
        (ResNet(50), "torchvision", "torchvision.models.resnet50()"),
        (ResNet(50), "safetensors", "torchvision.models.resnet50()"),
        (ResNet(152), "timm", "timm.create_model('resnet152', num_classes=0)"),
        (ResNet(50, width=128), "torchvision", "torchvision.models.wide_resnet50_2()"),
        (ResNet(101, width=128), "timm", "timm.create_model('wide_resnet101_2', num_classes=0)"),
        (ResNet(50, 128, 128, 128), "torchvision", "moco.models.backbone.ResNet(Bottleneck, "),
        (ResNet(152, width=128), "torchvision", None),
        (ResNet(50, width=32), "timm", None),
        (ResNet(50, stem_channels=32), "safetensors", None),
    ],
)
def test_the_network_a_file_is_for(network, form, call):
    if call is None:
        with pytest.raises(CheckpointError, match="has a wide_|timm has no|has a resnet50"):
            network_for(network, form, "f.pth")
    else:
        assert network_for(network, form, "f.pth").call.startswith(call)
