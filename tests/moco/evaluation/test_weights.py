"""Weights files: what is identified by names and shapes, strict loading, the proof."""

from __future__ import annotations

import pytest
import tiny
import torch
import torchvision

from moco.data.images import find_images
from moco.data.rgb import Decoding
from moco.errors import CheckpointError
from moco.evaluation.weights import pretrained_from, read_pretrained
from moco.methods import build_method
from moco.models.backbone import build_backbone
from moco.training.trainer import Trainer


def saved(tmp_path, state, **others):
    torch.save({"epoch": 1, "arch": "any", "state_dict": state, "optimizer": {}, **others},
               tmp_path / "weights.pth.tar")  # fmt: skip
    return str(tmp_path / "weights.pth.tar")


def moco_state(method):
    return {f"module.{name}": tensor for name, tensor in method.state_dict().items()}


def images(size=16):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_checkpoint_without_configuration_is_the_query_encoder(tmp_path, head, stem):
    """As the reference's: architecture, width, stem and head follow from names and shapes."""
    cfg = tiny.config(MODEL__HEAD=head, MODEL__STEM=stem)
    method = build_method(cfg)
    torch.nn.init.ones_(method.encoder_k.conv1.weight)  # which must not be taken
    pretrained = read_pretrained(saved(tmp_path, moco_state(method)))
    assert pretrained.layout == "moco" and pretrained.arch == "resnet18"
    assert pretrained.options == {
        "arch": "resnet18", "width": 0.125, "stem": stem, "channels": 3,
    }  # fmt: skip
    method.eval()
    encoder = pretrained.build_encoder(image_size=16)
    expected = method.encoder_q.forward_features(images())
    assert torch.equal(encoder.forward_features(images()), expected)
    whole = pretrained.build_encoder(image_size=16, head=True)
    assert torch.equal(whole(images()), method.encoder_q(images()))
    assert pretrained.differing(encoder) == []


@pytest.mark.parametrize("variant", ["moco_v3", "moco_v3: ViT"])
def test_heads_and_vits_of_v3(image_folder, tmp_path, variant):
    cfg = tiny.method_config(variant, TRAIN__EPOCHS=1, MODEL__WIDTH="0.125")
    trainer = Trainer(cfg, find_images(image_folder), tmp_path, tiny.alone(), say=lambda line: None)
    trainer.train()
    pretrained = read_pretrained(str(tmp_path))
    assert (pretrained.size, pretrained.mean) == (16, tuple(cfg.DATA.MEAN))
    encoder_q = trainer.method.transfer_encoder().eval()
    whole = pretrained.build_encoder(image_size=16, head=True)
    assert torch.equal(whole(images()), encoder_q(images()))
    if "ViT" in variant:
        with pytest.raises(CheckpointError, match="trained with images of 16 pixels"):
            pretrained.build_encoder(image_size=32)
        # The number of heads is in no shape: without `arch` it is unknown.
        bare = saved(tmp_path, moco_state(trainer.method))
        with pytest.raises(CheckpointError, match="num_heads=None.* cannot be evaluated here"):
            read_pretrained(bare)


def test_other_projects_layouts_are_read(tmp_path):
    """MoCo v3's names; its head is not evaluated."""
    network = build_backbone("resnet18", num_classes=3, width=0.125).eval()
    state = {f"module.base_encoder.{n}": t for n, t in network.state_dict().items()}
    pretrained = read_pretrained(saved(tmp_path, state))
    assert pretrained.layout == "moco-v3" and pretrained.head == {}
    encoder = pretrained.build_encoder(image_size=16)
    assert torch.equal(encoder.forward_features(images()), network.forward_features(images()))


def test_an_unknown_head_is_refused(tmp_path):
    state = build_backbone("resnet18", num_classes=3, width=0.125).state_dict()
    state = {f"encoder_q.{n}": t for n, t in state.items()}
    state["encoder_q.fc.gate"] = torch.zeros(2)
    pretrained = read_pretrained(saved(tmp_path, state))
    pretrained.build_encoder(image_size=16)
    with pytest.raises(CheckpointError, match="its projection head is unknown"):
        pretrained.build_encoder(image_size=16, head=True)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_torchvisions_names_bare_or_wrapped(tmp_path, prefix, wrapped):
    network = torchvision.models.resnet18(num_classes=5).eval()
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "resnet18.pth")
    pretrained = read_pretrained(str(tmp_path / "resnet18.pth"))
    assert pretrained.layout == "torchvision" and pretrained.options["width"] == 1.0
    encoder = pretrained.build_encoder(image_size=33)
    network.fc = torch.nn.Identity()
    assert torch.equal(encoder.forward_features(images(33)), network(images(33)))
    with pytest.raises(CheckpointError, match="holds no projection head"):
        pretrained.build_encoder(image_size=33, head=True)


def test_old_files_lack_batch_counters(tmp_path):
    network = build_backbone("resnet18", num_classes=3, width=0.125)
    state = {n: t for n, t in network.state_dict().items() if "num_batches" not in n}
    pretrained = pretrained_from(state, "old.pth", "")
    assert pretrained.differing(pretrained.build_encoder(image_size=16)) == []


def test_the_proof_sees_the_last_bit_and_every_buffer():
    state = build_backbone("resnet18", num_classes=3, width=0.125).state_dict()
    pretrained = pretrained_from(state, "file.pth", "")
    for name in ("layer4.1.conv2.weight", "layer2.0.bn1.running_var",
                 "layer3.0.downsample.1.num_batches_tracked"):  # fmt: skip
        encoder = pretrained.build_encoder(image_size=16)
        tensor = encoder.state_dict()[name]
        bits = tensor.flatten().view(torch.uint8)
        bits[0] ^= 1
        assert pretrained.differing(encoder) == [name]
    encoder = pretrained.build_encoder(image_size=16)
    encoder.bn1.bias.data.neg_()  # zeros become -0.0, which == would pass
    assert torch.equal(encoder.bn1.bias, state["bn1.bias"])
    assert pretrained.differing(encoder) == ["bn1.bias"]


def without(state, name):
    return {n: t for n, t in state.items() if n != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: without(s, "layer3.0.bn1.bias"), "1 tensors are missing: layer3.0.bn1.bias"),
        (lambda s: {**s, "layer9.x": torch.zeros(1)}, "'layer9.x' is neither part"),
        (lambda s: {**s, "bn1.bias": torch.zeros(3)}, r"'bn1.bias' has shape \(3,\)"),
        (lambda s: {**s, "bn1.bias": torch.full((8,), torch.nan)}, "'bn1.bias' holds NaN"),
        (lambda s: {**s, "layer1.5.conv1.weight": torch.zeros(1)}, r"layers hold \(6, 2, 2, 2\)"),
        (lambda s: {"a": torch.zeros(1)}, "unknown layout, first keys: 'a'"),
        (lambda s: 3, "holds no dict of named tensors"),
        (lambda s: {**s, "bn1.bias": "x"}, "'bn1.bias' is no tensor"),
        (lambda s: torchvision.models.wide_resnet50_2().state_dict(), "cannot be evaluated here"),
    ],
)
def test_wrong_files_are_refused_in_one_line(change, message):
    state = build_backbone("resnet18", num_classes=3, width=0.125).state_dict()
    with pytest.raises(CheckpointError, match=message) as caught:
        pretrained_from(change(state), "file.pth", "").build_encoder(image_size=16)
    assert str(caught.value).startswith("file.pth: ") and "\n" not in str(caught.value)


def test_a_run_folder_gives_its_newest_verified_checkpoint(image_folder, tmp_path):
    cfg = tiny.config(TRAIN__EPOCHS=2, CHECKPOINT__KEEP_LAST=2)
    Trainer(cfg, find_images(image_folder), tmp_path, tiny.alone(), say=lambda line: None).train()
    assert read_pretrained(str(tmp_path)).path.endswith("checkpoint_0001.pth.tar")
    with open(tmp_path / "checkpoint_0001.pth.tar", "r+b") as file:
        file.seek(2000)
        file.write(b"damaged")
    pretrained = read_pretrained(str(tmp_path))
    assert pretrained.path.endswith("checkpoint_0000.pth.tar")
    assert "checkpoint_0001" in pretrained.notes[0]
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        read_pretrained(str(tmp_path / "checkpoint_0001.pth.tar"))


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no verified checkpoint"):
        read_pretrained(str(tmp_path))


def test_images_are_decoded_as_in_pretraining(image_folder, tmp_path):
    cfg = tiny.config(
        TRAIN__EPOCHS=1, DATA__SIXTEEN_BIT_RANGE="(0, 4095)", DATA__MAX_IMAGE_PIXELS=5000
    )
    Trainer(cfg, find_images(image_folder), tmp_path, tiny.alone(), say=lambda line: None).train()
    pretrained = read_pretrained(str(tmp_path))
    assert pretrained.decoding == Decoding((0, 4095), 5000)
    plain = tiny.config()
    state = moco_state(build_method(plain))
    foreign = read_pretrained(saved(tmp_path, state))
    assert foreign.decoding == Decoding()
