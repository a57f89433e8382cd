"""MODEL.WEIGHTS: what is taken from a file, what is said, and what a resumed run compares."""

from __future__ import annotations

import shutil

import foreign_files
import pytest
import tiny
import torch
from PIL import Image
from processes import in_processes
from scripts import load_tool

from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, ConfigError
from moco.models.backbone import build_backbone
from moco.training import checkpoint as ckpt
from moco.training.changes import pretraining_changes
from moco.training.image_record import record_in
from moco.training.trainer import Trainer

LAST = "checkpoint_0002.pth.tar"
# As `tools/pretrain.py` computes when nothing is said: what the machine is good at.
DEFAULTS = {"TRAIN__AMP": None, "TRAIN__CHANNELS_LAST": None, "TRAIN__COMPILE": None}


def trainer(images, folder, said=None, *, resume=False, variant="moco", allow=(), **changes):
    say = (said if said is not None else []).append
    return Trainer(
        tiny.method_config(variant, **changes), find_images(images), folder, tiny.alone(),
        resume=resume, allow_change=allow, say=say,
    )  # fmt: skip


def weights_line(said):
    [line] = [line for line in said if line.startswith("MODEL.WEIGHTS: encoder")]
    return line


def part(state, prefix):
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def torchvisions(tmp_path):
    """A torchvision-layout file of the tiny network, with a classifier of 10 classes."""
    torch.manual_seed(5)
    state = build_backbone("resnet18", num_classes=10, width=0.125, stem="cifar").state_dict()
    torch.save(state, tmp_path / "torchvision.pth")
    return tmp_path / "torchvision.pth", state


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_run_of_ours_is_the_start_of_every_method(image_folder, tmp_path, variant):
    """Written with the default settings; its head and predictor are the method's own."""
    first = trainer(image_folder, tmp_path / "a", variant=variant, TRAIN__EPOCHS=1, **DEFAULTS)
    first.train()
    file = ckpt.read_torch_file(tmp_path / "a" / "checkpoint_0000.pth.tar")
    given = part(file["state_dict"], "module.")
    said = []
    run = trainer(image_folder, tmp_path / "b", said, variant=variant,
                  MODEL__WEIGHTS=tmp_path / "a", **DEFAULTS)  # fmt: skip
    own = run.method.state_dict()
    assert same(part(own, "encoder_q."), part(given, "encoder_q."))
    assert same(part(own, "predictor."), part(given, "predictor."))
    if "encoder_k.conv1.weight" in own or "encoder_k.cls_token" in own:
        assert same(part(own, "encoder_k."), part(own, "encoder_q."))
        assert not same(part(own, "encoder_k."), part(given, "encoder_k."))
    unseeded = trainer(image_folder, tmp_path / "c", variant=variant, **DEFAULTS).method
    for name in ("queue", "queue_ptr", "bank"):
        if name in own:
            assert torch.equal(own[name], unseeded.state_dict()[name])
    assert not same(part(own, "encoder_q."), part(unseeded.state_dict(), "encoder_q."))
    line = weights_line(said)
    assert f"of {tmp_path / 'a'}/checkpoint_0000.pth.tar (moco); head: " in line
    assert "tensors of the same file" in line and "fc (" not in line


def test_torchvisions_file(image_folder, tmp_path, torchvisions):
    file, state = torchvisions
    said = []
    run = trainer(image_folder, tmp_path / "run", said, MODEL__WEIGHTS=file, **DEFAULTS)
    own = run.method.state_dict()
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    for encoder in ("encoder_q.", "encoder_k."):
        taken = {n: t for n, t in part(own, encoder).items() if not n.startswith("fc.")}
        assert same(taken, backbone)
    assert weights_line(said) == (
        f"MODEL.WEIGHTS: encoder: 100 tensors of {file} (torchvision); head: the file's is a "
        "classifier, initialised; queue: fresh; left out: fc (2)"
    )
    assert run.train() == 0
    content = ckpt.read_torch_file(tmp_path / "run" / LAST)
    record = content["extra"]["weights"]
    assert record["sha256"] == ckpt.sha256_of(file) and record["taken"] == {"encoder": 100}
    assert ckpt.verify_manifest(tmp_path / "run" / LAST)["weights"] == record


@pytest.mark.parametrize("kind", foreign_files.FILES)
def test_every_layout_that_is_read_is_a_start(image_folder, tmp_path, kind):
    build, stem = foreign_files.FILES[kind][0], 3 if "generator" in kind else 7
    query, key = (foreign_files.narrow_resnet("resnet18", seed, stem) for seed in (1, 2))
    torch.save(build(query, key), tmp_path / "file.pth")
    said = []
    run = trainer(image_folder, tmp_path / "run", said, MODEL__WEIGHTS=tmp_path / "file.pth",
                  MODEL__STEM="cifar" if stem == 3 else "imagenet", DATA__SIZE=32)  # fmt: skip
    own = part(run.method.state_dict(), "encoder_q.")
    assert all(torch.equal(own[name], tensor) for name, tensor in query.items())
    assert "encoder: 100 tensors" in weights_line(said) and "initialised" in weights_line(said)


def test_a_head_that_does_not_fit_is_initialised(image_folder, tmp_path):
    trainer(image_folder, tmp_path / "a", TRAIN__EPOCHS=1).train()
    for changes, why in (
        ({"MODEL__DIM": 4}, "the file's encoder_q.fc.2.weight has (8, 64), (4, 64) is needed"),
        ({"MODEL__HEAD": "linear"}, "the file's lacks encoder_q.fc.bias"),
    ):
        said = []
        trainer(image_folder, tmp_path / "b", said, MODEL__WEIGHTS=tmp_path / "a", **changes)
        assert f"head: {why}, initialised" in weights_line(said)
        assert "fc (4)" in weights_line(said)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MODEL__ARCH": "resnet34"}, "holds resnet18, WIDTH 0.125, STEM cifar, the configuration "
         "asks for resnet34, WIDTH 0.125, STEM cifar"),
        ({"MODEL__WIDTH": 0.25}, "asks for resnet18, WIDTH 0.25, STEM cifar"),
        ({"MODEL__STEM": "imagenet"}, "asks for resnet18, WIDTH 0.125, STEM imagenet"),
        ({"DATA__MEAN": (0.5, 0.5, 0.5)}, r"was trained with DATA.MEAN \(0.485, 0.456, 0.406\)"),
        ({"DATA__STD": (0.5, 0.5, 0.5)}, r"was trained with DATA.STD \(0.229, 0.224, 0.225\)"),
    ],
)  # fmt: skip
def test_another_network_or_other_pixels_are_refused(image_folder, tmp_path, changes, message):
    trainer(image_folder, tmp_path / "a", TRAIN__EPOCHS=1).train()
    with pytest.raises(CheckpointError, match=message) as error:
        trainer(image_folder, tmp_path / "b", MODEL__WEIGHTS=tmp_path / "a", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "b").exists()


def test_vits_of_other_heads_or_sizes_are_refused(image_folder, tmp_path):
    variant = "moco_v3: ViT"
    trainer(image_folder, tmp_path / "a", variant=variant, TRAIN__EPOCHS=1).train()
    with pytest.raises(CheckpointError, match="for images of 16 pixels, the configuration"):
        trainer(image_folder, tmp_path / "b", variant=variant, MODEL__WEIGHTS=tmp_path / "a",
                DATA__SIZE=32)  # fmt: skip
    content = ckpt.read_torch_file(tmp_path / "a" / "checkpoint_0000.pth.tar")
    torch.save({**content, "num_heads": 6}, tmp_path / "six.pth")
    with pytest.raises(CheckpointError, match="has 6 heads, the ViTs here have 12"):
        trainer(image_folder, tmp_path / "b", variant=variant, MODEL__WEIGHTS=tmp_path / "six.pth")


def test_a_resumed_run_needs_the_file_no_more(image_folder, tmp_path, torchvisions):
    file, _ = torchvisions
    expected = tmp_path / "whole"
    trainer(image_folder, expected, MODEL__WEIGHTS=file).train()
    run = trainer(image_folder, tmp_path / "run", MODEL__WEIGHTS=file)
    assert run.train([tiny.StopAfter(5)]) == 143
    moved = tmp_path / "moved.pth"
    shutil.copy(file, moved)
    trainer(image_folder, tmp_path / "run", resume=True, MODEL__WEIGHTS=moved)  # same content
    file.unlink()
    said = []
    resumed = trainer(image_folder, tmp_path / "run", said, resume=True, MODEL__WEIGHTS=file)
    assert resumed.first_step == 6 and resumed.train() == 0
    assert not any(line.startswith("MODEL.WEIGHTS") for line in said)
    digests = [tiny.state_digest(ckpt.read_torch_file(f / LAST)) for f in
               (expected, tmp_path / "run")]  # fmt: skip
    assert digests[0] == digests[1]
    assert ckpt.read_torch_file(tmp_path / "run" / LAST)["extra"]["weights"]["given"] == str(file)


def test_another_file_is_another_run(image_folder, tmp_path, torchvisions):
    file, state = torchvisions
    trainer(image_folder, tmp_path / "run", MODEL__WEIGHTS=file, TRAIN__EPOCHS=1).train()
    torch.save({**state, "conv1.weight": state["conv1.weight"] + 1}, tmp_path / "other.pth")
    started = rf"its run started from {file} \(sha256 [0-9a-f]{{16}}\), MODEL.WEIGHTS is "
    for now, message in (
        (tmp_path / "other.pth", rf"{started}{tmp_path}/other.pth \(sha256"),
        ("", f"{started}empty now; weights are read at the start alone"),
        (tmp_path / "none.pth", rf"{started}{tmp_path}/none.pth \(there is no such file\) now"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trainer(image_folder, tmp_path / "run", resume=True, MODEL__WEIGHTS=now,
                    TRAIN__EPOCHS=1)  # fmt: skip
    shutil.copy(tmp_path / "other.pth", file)  # the same path, another content
    with pytest.raises(CheckpointError, match=started):
        trainer(image_folder, tmp_path / "run", resume=True, MODEL__WEIGHTS=file, TRAIN__EPOCHS=1)
    trainer(image_folder, tmp_path / "random", TRAIN__EPOCHS=1).train()
    with pytest.raises(CheckpointError, match="its run started from no file, MODEL.WEIGHTS is "):
        trainer(image_folder, tmp_path / "random", resume=True, MODEL__WEIGHTS=file,
                TRAIN__EPOCHS=1)  # fmt: skip
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is read at the start of a run alone"):
        pretraining_changes(["MODEL.WEIGHTS"])


def test_a_run_folder_that_grew_is_the_same_start(image_folder, tmp_path):
    changes = {"CHECKPOINT__KEEP_LAST": 3}
    source = trainer(image_folder, tmp_path / "a", **changes)
    source.train([tiny.StopAfter(3)])
    run = trainer(image_folder, tmp_path / "b", MODEL__WEIGHTS=tmp_path / "a")
    run.train([tiny.StopAfter(2)])
    trainer(image_folder, tmp_path / "a", resume=True, **changes).train()
    resumed = trainer(image_folder, tmp_path / "b", resume=True, MODEL__WEIGHTS=tmp_path / "a")
    assert resumed.first_step == 3


def test_dry_run_says_what_would_be_taken(image_folder, tmp_path, torchvisions, capsys):
    words = ["--config-file", "configs/pretrain/moco_v2_200ep.yaml", "--data", str(image_folder),
             "--output-dir", str(tmp_path / "run"), "--device", "cpu", "--dry-run"]  # fmt: skip
    tool = load_tool("pretrain")
    for width, code in (("0.125", 0), ("0.25", 2)):
        with pytest.raises(SystemExit) as end:
            tool.main([*words, *tiny.overrides(MODEL__WEIGHTS=torchvisions[0], MODEL__WIDTH=width)])
        assert end.value.code == code
        said = capsys.readouterr()
        assert ("MODEL.WEIGHTS: encoder: 100 tensors" in said.out) == (code == 0)
        assert ("error: MODEL.WEIGHTS" in said.err) == (code == 2)
    assert not (tmp_path / "run").exists()


def _start_in_two(rank, images, folder, file):
    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))
    cfg = tiny.config(MODEL__WEIGHTS=file, TRAIN__BATCH_SIZE=8, TRAIN__EPOCHS=1, KNN__PERIOD=0)
    run = Trainer(cfg, find_images(images), folder, process, say=lambda line: None)
    started = run.method.encoder_q.conv1.weight.detach().clone()
    assert run.train() == 0
    return {"started": started, "ended": run.method.encoder_q.conv1.weight.detach()}


def test_two_processes_start_alike(image_folder, tmp_path, torchvisions):
    file, state = torchvisions
    found = in_processes(_start_in_two, tmp_path, image_folder, tmp_path / "run", str(file))
    for of_rank in found:
        assert torch.equal(of_rank["started"], state["conv1.weight"])
        assert torch.equal(of_rank["ended"], found[0]["ended"])
    record = ckpt.read_torch_file(tmp_path / "run" / "checkpoint_0000.pth.tar")["extra"]["weights"]
    assert record["file"] == str(file)


def test_the_images_that_the_weights_have_seen_are_taken_over(image_folder, tmp_path, torchvisions):
    """So a test image among them is found in what this run is converted to."""
    trainer(image_folder, tmp_path / "a", TRAIN__EPOCHS=1).train()
    shutil.copytree(image_folder / "train", tmp_path / "others")
    for number, file in enumerate(sorted((tmp_path / "others").rglob("*.png"))):
        Image.new("RGB", (24, 24), (number, 2 * number, 255 - number)).save(file)
    changes = {"MODEL__WEIGHTS": tmp_path / "a", "TRAIN__EPOCHS": 1}
    for resume in (False, True):
        run = trainer(tmp_path / "others", tmp_path / "b", resume=resume, **changes)
        run.train()
    path = tmp_path / "b" / "checkpoint_0000.pth.tar"
    record = record_in(ckpt.read_torch_file(path), str(path))
    assert len(record.rows) == 64 and record.lacks == ""
    changes["MODEL__WEIGHTS"] = torchvisions[0]
    trainer(tmp_path / "others", tmp_path / "c", **changes).train()
    path = tmp_path / "c" / "checkpoint_0000.pth.tar"
    record = record_in(ckpt.read_torch_file(path), str(path))
    assert len(record.rows) == 32 and "those of the weights it began with are unk" in record.lacks
