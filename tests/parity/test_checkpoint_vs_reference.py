"""Checkpoint files both ways: the reference's continue here, ours there.

Live (`MOCO_REFERENCE=CHECKOUT pytest -m reference`): each side is trained some steps, saved as it
saves, loaded by the other and trained on; every tensor must be that of the side that never
stopped. Without a checkout the names and their order are compared with the reference's, recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torchvision
from default_runs import as_before
from parity.moco_sides import CASES, NUM_STEPS, STEPS_PER_EPOCH, MocoCase, Ours, Reference

from moco import cfgnode
from moco.errors import CheckpointError
from moco.methods.moco import MoCo
from moco.training import state
from moco.training.checkpoint import latest_verified, read_torch_file
from moco.training.identity import RunIdentity
from moco.training.layouts import read_backbone

live = pytest.mark.reference
STOP = 2 * STEPS_PER_EPOCH


@pytest.fixture
def reference_at_hand(tmp_path):
    if "MOCO_REFERENCE" not in os.environ:
        pytest.skip("MOCO_REFERENCE names no checkout of facebookresearch/moco at 7397dfe")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(side: Ours | Reference, first: int, last: int) -> None:
    for step in range(first, last):
        side.step(step)


def tensors(side: Ours | Reference) -> dict[str, torch.Tensor]:
    """All learned state, momentum buffers of SGD included."""
    found = dict(side.method.state_dict())
    for name, parameter in side.method.named_parameters():
        momentum = side.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            found[f"momentum of {name}"] = momentum
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def identity(case: MocoCase) -> RunIdentity:
    return RunIdentity(cfgnode.to_dict(case.config()), "digest", "data", 1, STEPS_PER_EPOCH)


def other_start(case: MocoCase) -> MocoCase:
    """The same training, but for the weights it begins with."""
    return dataclasses.replace(case, seed=case.seed + 50)


def continued(side: Ours | Reference, case: MocoCase) -> None:
    side.case = case  # its images and permutations
    train(side, STOP, NUM_STEPS)


@live
@pytest.mark.parametrize("name", CASES)
def test_the_references_file_continues_here(reference_at_hand, tmp_path, name):
    """facebookresearch/moco, main_moco.py: the four keys of save_checkpoint."""
    case = CASES[name]
    theirs = Reference(case)
    train(theirs, 0, STOP)
    content = {
        "epoch": STOP // STEPS_PER_EPOCH,
        "arch": case.arch,
        "state_dict": theirs.model.state_dict(),
        "optimizer": theirs.optimizer.state_dict(),
    }
    torch.save(content, tmp_path / "theirs.pth.tar")
    ours = Ours(other_start(case))
    assert not equal(tensors(ours), tensors(theirs))
    done = state.restore(
        tmp_path / "theirs.pth.tar",
        method=ours.method, optimizer=ours.optimizer, identity=identity(case),
    )  # fmt: skip
    assert done == STOP
    assert equal(tensors(ours), tensors(theirs))
    train(theirs, STOP, NUM_STEPS)
    continued(ours, case)
    assert equal(tensors(ours), tensors(theirs))
    backbone = read_backbone(read_torch_file(tmp_path / "theirs.pth.tar"))
    assert (backbone.layout, backbone.prefix) == ("moco", "module.encoder_q.")


@live
@pytest.mark.parametrize("name", CASES)
def test_our_file_continues_there(reference_at_hand, tmp_path, name):
    """facebookresearch/moco, main_moco.py: what `--resume` does."""
    case = CASES[name]
    ours = Ours(case)
    train(ours, 0, STOP)
    path = tmp_path / "ours.pth.tar"
    state.save(
        path, method=ours.method, optimizer=ours.optimizer, step=STOP, arch=case.arch,
        identity=identity(case),
    )  # fmt: skip
    theirs = Reference(other_start(case))
    checkpoint = torch.load(path, weights_only=True)
    theirs.model.load_state_dict(checkpoint["state_dict"])
    theirs.optimizer.load_state_dict(checkpoint["optimizer"])
    assert checkpoint["epoch"] == STOP // STEPS_PER_EPOCH
    assert equal(tensors(theirs), tensors(ours))
    train(ours, STOP, NUM_STEPS)
    continued(theirs, case)
    assert equal(tensors(theirs), tensors(ours))


def one_step(case: MocoCase, load) -> dict[str, torch.Tensor]:
    """All learned state of the reference after `load(side)` and a step."""
    side = Reference(other_start(case))
    load(side)
    side.step(0)
    return tensors(side)


@live
def test_a_default_runs_file_continues_there(reference_at_hand, default_runs):
    """tools/pretrain.py with its fast defaults; main_moco.py resumes as above. What is right comes
    from the values alone, put into the reference's own tensors."""
    case = MocoCase(arch="resnet50", width=0.5, stem="imagenet", size=32, dim=128)
    content = read_torch_file(latest_verified(default_runs.run)[0])
    assert not content["extra"]["config"]["TRAIN"]["REFERENCE"]

    def resume(side, content=content):
        side.model.load_state_dict(content["state_dict"])
        side.optimizer.load_state_dict(content["optimizer"])

    def fill(side):
        side.model.load_state_dict(content["state_dict"])
        for number, weight in enumerate(side.model.parameters()):
            if number in content["optimizer"]["state"]:
                momentum = torch.zeros(weight.shape)
                momentum.copy_(content["optimizer"]["state"][number]["momentum_buffer"])
                side.optimizer.state[weight]["momentum_buffer"] = momentum

    right = one_step(case, fill)
    assert equal(one_step(case, resume), right)
    # Negative control: the file as it was written before.
    wrong = one_step(case, partial(resume, content=as_before(content)))
    assert sum(not torch.equal(wrong[name], right[name]) for name in right) >= 17


@live
def test_negative_control_a_file_without_its_momentum_ends_elsewhere(reference_at_hand, tmp_path):
    case = CASES["v2"]
    ours = Ours(case)
    train(ours, 0, STOP)
    theirs = Reference(other_start(case))
    theirs.method.load_state_dict(ours.method.state_dict())
    train(ours, STOP, NUM_STEPS)
    continued(theirs, case)
    assert not equal(tensors(theirs), tensors(ours))


@live
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_recorded_names_are_the_references(reference_at_hand, head):
    case = MocoCase(head=head, arch="resnet50", width=1.0, stem="imagenet", dim=128)
    assert digest_of(Reference(case).model.state_dict()) == RECORDED[head]


# SHA-256 of the names of the reference's state dict for ResNet-50, joined by line ends
# (facebookresearch/moco at 7397dfe, moco/builder.py in DistributedDataParallel, as above).
RECORDED = {
    "mlp": "f74d1f06ee13208bb454cc6f4d61c3d465f2eb8bd06dae7eb9e4130e087bc642",
    "linear": "31a27bd476856675a09ed5c9b299cef4d83c556c1a7fe0bad9879262b8437570",
}


def digest_of(names) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def golden_names(head: str) -> list[str]:
    """The reference's names, put together by hand from torchvision's ResNet-50."""
    with torch.device("meta"):
        backbone = [n for n in torchvision.models.resnet50().state_dict() if "fc." not in n]
    last = ["fc.weight", "fc.bias"]
    if head == "mlp":
        last = ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
    encoders = [f"module.{e}.{n}" for e in ("encoder_q", "encoder_k") for n in backbone + last]
    # A module's own buffers come before those of its children.
    return ["module.queue", "module.queue_ptr", *encoders]


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_our_files_names_and_order_are_the_references(head, tmp_path):
    names = golden_names(head)
    assert digest_of(names) == RECORDED[head]
    case = MocoCase(head=head, arch="resnet50", dim=128)  # narrow: the names are the same
    method = MoCo.from_config(case.config())
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9)
    state.save(
        tmp_path / "c.pth.tar", method=method, optimizer=optimizer, step=0, arch="resnet50",
        identity=identity(case),
    )  # fmt: skip
    content = read_torch_file(tmp_path / "c.pth.tar")
    assert list(content["state_dict"]) == names
    assert list(content)[:4] == ["epoch", "arch", "state_dict", "optimizer"]
    [group] = content["optimizer"]["param_groups"]
    assert group["params"] == list(range(len(group["params"])))
    parameters = [n for n in names if not n.endswith(("_mean", "_var", "_tracked"))][2:]
    assert len(group["params"]) == len(parameters)
    assert [f"module.{n}" for n, _ in method.named_parameters()] == parameters


def test_negative_control_another_order_is_seen():
    names = golden_names("mlp")
    assert digest_of([*names[2:], *names[:2]]) != RECORDED["mlp"]


def test_a_file_of_the_other_head_is_refused(tmp_path):
    case = CASES["v2"]
    ours = Ours(case)
    state.save(
        tmp_path / "c.pth.tar", method=ours.method, optimizer=ours.optimizer, step=0,
        arch=case.arch, identity=identity(case),
    )  # fmt: skip
    content = torch.load(tmp_path / "c.pth.tar", weights_only=True)
    del content["extra"]
    torch.save(content, tmp_path / "r.pth.tar")
    linear = Ours(dataclasses.replace(case, head="linear"))
    with pytest.raises(CheckpointError, match="4 missing: encoder_q.fc.weight"):
        state.restore(
            tmp_path / "r.pth.tar",
            method=linear.method, optimizer=linear.optimizer, identity=identity(case),
        )  # fmt: skip
