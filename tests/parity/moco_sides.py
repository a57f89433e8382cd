"""MoCo's training steps, seen from two sides: this project's, and the reference's.

Both start from weights made of their names, take the same uint8 images and the same permutations
of shuffle BN, and are stepped together; `observe` yields, after each step, everything that step
computed. `Ours` runs the training loop's own `train_step`. The reference's side runs its own
model class in DistributedDataParallel, as its main_moco.py does; only what torch needs to do that
without a GPU is put in its place (see `reference_class`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torchvision
from parity.cases import uniform

import moco.methods.moco as ours
from moco.cfgnode import CfgNode
from moco.config import load_pretrain_config
from moco.data.augment import normalize
from moco.distributed import ProcessInfo, data_parallel, rank, world_size
from moco.models.backbone import build_backbone
from moco.seeding import derive_seed
from moco.training.acceleration import resolve
from moco.training.optimizer import build_optimizer
from moco.training.schedule import learning_rate
from moco.training.step import train_step

NUM_STEPS = 20
STEPS_PER_EPOCH = 5
Named = dict[str, torch.Tensor]


@dataclass(frozen=True)
class MocoCase:
    """A small MoCo. The queue holds three batches, so its pointer wraps."""

    head: str = "mlp"
    temperature: float = 0.2
    schedule: str = "cosine"
    arch: str = "resnet18"
    width: float = 0.125
    stem: str = "cifar"
    size: int = 18
    dim: int = 8
    batch: int = 8  # of all processes together
    lr: float = 0.03
    seed: int = 0

    def config(self, *changes: object) -> CfgNode:
        pairs = {
            "SEED": self.seed,
            "MODEL.ARCH": self.arch,
            "MODEL.WIDTH": self.width,
            "MODEL.STEM": self.stem,
            "MODEL.HEAD": self.head,
            "MODEL.DIM": self.dim,
            "MOCO.QUEUE_SIZE": 3 * self.batch,
            "MOCO.TEMPERATURE": self.temperature,
            "MOCO.MOMENTUM": 0.99,
            "TRAIN.BATCH_SIZE": self.batch,
            "TRAIN.EPOCHS": NUM_STEPS // STEPS_PER_EPOCH,
            "TRAIN.SCHEDULE": self.schedule,
            "TRAIN.MILESTONES": (1, 2),
            "TRAIN.LR": self.lr,
            "TRAIN.REFERENCE": True,
        }
        words = [str(word) for pair in pairs.items() for word in pair]
        cfg = load_pretrain_config(None, [*words, *map(str, changes)])
        return resolve(cfg, torch.device("cpu")).cfg


CASES = {
    "v2": MocoCase(),
    "v1": MocoCase(head="linear", temperature=0.07, schedule="step", seed=1),
}
# The networks that are trained in earnest; too slow for the test suite.
LARGE_CASES = {
    "v2, ResNet-50": MocoCase(arch="resnet50", width=1.0, stem="imagenet", size=69, dim=128),
}


def named_state(state: Named, seed: int) -> Named:
    """A tensor for every entry of a MoCo state dict, a function of its name and the seed."""
    made = {}
    for name, like in state.items():
        values = torch.from_numpy(uniform(name, seed, like.numel())).view(like.shape)
        if name.endswith(("num_batches_tracked", "queue_ptr")):
            made[name] = torch.zeros_like(like)
            continue
        if name == "queue":
            values = nn.functional.normalize(values, dim=0)
        elif name.endswith("running_var"):
            values = 1.0 + 0.4 * values
        elif like.dim() > 1:
            values = values * (6.0 / like[0].numel()) ** 0.5
        elif name.endswith("weight"):
            values = 1.0 + 0.2 * values
        else:
            values = 0.1 * values
        made[name] = values.to(like.dtype)
    return made


def views(case: MocoCase, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's two views of a step, uint8 [B, 3, size, size]: patches and noise."""
    share = case.batch // world_size()
    made = []
    for view in ("query", "key"):
        name = f"{view}s of step {step}"
        coarse = torch.from_numpy(uniform(f"{name}, patches", case.seed, case.batch * 27))
        coarse = coarse.view(case.batch, 3, 3, 3)
        shape = (case.batch, 3, case.size, case.size)
        noise = torch.from_numpy(uniform(f"{name}, noise", case.seed, torch.Size(shape).numel()))
        images = nn.functional.interpolate(coarse, case.size) * 90 + noise.view(shape) * 30 + 128
        made.append(images.to(torch.uint8)[rank() * share : (rank() + 1) * share])
    return made[0], made[1]


def step_rate(case: MocoCase, cfg: CfgNode, step: int) -> float:
    epoch = step // STEPS_PER_EPOCH
    return learning_rate(case.schedule, case.lr, epoch, cfg.TRAIN.EPOCHS, cfg.TRAIN.MILESTONES)


class Ours:
    """This project's method (or a mutant of it, for the controls) and its training step."""

    def __init__(
        self,
        case: MocoCase,
        method_class: type[ours.MoCo] = ours.MoCo,
        changes: tuple = (),
        dtype: torch.dtype = torch.float32,
    ):
        self.case, self.cfg = case, case.config(*changes)
        self.method = _prepared(method_class.from_config(self.cfg), case, dtype)
        self.process = ProcessInfo(rank(), world_size(), 0, torch.device("cpu"))
        self.model = self.method
        if world_size() > 1:
            self.model = data_parallel(self.method, self.process)
        self.optimizer = build_optimizer(self.cfg, self.method)

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits of step `step`, after its update."""
        seen = []
        original = ours.info_nce_loss
        ours.info_nce_loss = lambda logits: original(seen.append(logits.detach()) or logits)
        try:
            view_q, view_k = views(self.case, step)
            batch = view_q, view_k, torch.arange(len(view_q))
            result = train_step(
                self.model, self.method, self.optimizer, batch, step=step,
                lr=step_rate(self.case, self.cfg, step), momentum=self.cfg.MOCO.MOMENTUM,
                cfg=self.cfg, process=self.process,
            )  # fmt: skip
        finally:
            ours.info_nce_loss = original
        return result.loss, seen[0]


class Reference:
    """The reference's model, stepped as its main_moco.py does.

    Args:
        broadcast_buffers: as there, each forward begins with rank 0's buffers on all ranks.
    """

    def __init__(
        self,
        case: MocoCase,
        broadcast_buffers: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        self.case, self.cfg = case, case.config()

        def encoder(num_classes: int) -> nn.Module:
            if case.width == 1.0 and case.stem == "imagenet":
                return getattr(torchvision.models, case.arch)(num_classes=num_classes)
            return build_backbone(
                case.arch, num_classes=num_classes, width=case.width, stem=case.stem
            )

        moco = self.cfg.MOCO
        method = reference_class()(
            encoder, case.dim, moco.QUEUE_SIZE, moco.MOMENTUM, case.temperature, case.head == "mlp"
        )
        self.method = _prepared(method, case, dtype)
        if broadcast_buffers:
            self.model = nn.parallel.DistributedDataParallel(self.method)
        else:
            self.model = data_parallel(
                self.method, ProcessInfo(rank(), world_size(), 0, torch.device("cpu"))
            )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), case.lr, momentum=0.9, weight_decay=1e-4
        )

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits of step `step`, after its update."""
        for group in self.optimizer.param_groups:
            group["lr"] = step_rate(self.case, self.cfg, step)
        data = self.cfg.DATA
        view_q, view_k = (normalize(v, data.MEAN, data.STD) for v in views(self.case, step))
        # Its only draw is the permutation, from torch's global generator: the same one as ours.
        torch.manual_seed(derive_seed(self.case.seed, "method-step", step))
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor):
            logits, target = self.model(im_q=view_q, im_k=view_k)
        loss = nn.functional.cross_entropy(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), logits.detach()


def _prepared(method: nn.Module, case: MocoCase, dtype: torch.dtype) -> nn.Module:
    """The method with the case's weights, computing in `dtype` whatever the images' type."""
    method.load_state_dict(named_state(method.state_dict(), case.seed))
    for encoder in (method.encoder_q, method.encoder_k):
        encoder.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    return method.to(dtype)


def reference_class() -> type[nn.Module]:
    """MoCo of the checkout that the environment variable MOCO_REFERENCE names.

    The file is used as it is. Two small tensors it moves to the GPU stay here (`Reference.step`).
    """
    path = Path(os.environ["MOCO_REFERENCE"]) / "moco" / "builder.py"
    spec = importlib.util.spec_from_file_location("reference_moco_builder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MoCo


def observe(side: Ours | Reference) -> Iterator[Named]:
    """Steps a side NUM_STEPS times; after each: all it computed, as "group/tensor"."""
    for step in range(NUM_STEPS):
        loss, logits = side.step(step)
        seen = {"loss/": loss, "logits/": logits}
        for name, parameter in side.method.named_parameters():
            if parameter.grad is not None:
                seen[f"gradients/{name}"] = parameter.grad
                momentum = side.optimizer.state[parameter]["momentum_buffer"]
                seen[f"momentum buffers of SGD/{name}"] = momentum
        for name, tensor in side.method.state_dict().items():
            seen[f"{_group(name)}/{name}"] = tensor
        yield {name: tensor.detach().clone() for name, tensor in seen.items()}


def _group(name: str) -> str:
    if name in ("queue", "queue_ptr"):
        return {"queue": "queue", "queue_ptr": "queue pointer"}[name]
    encoder = "query encoder" if name.startswith("encoder_q.") else "key encoder"
    buffer = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    return f"{encoder}, {'batch-norm buffers' if buffer else 'weights'}"


def differences(a: Iterator[Named], b: Iterator[Named]) -> dict[str, tuple[float, bool]]:
    """group -> (largest absolute difference over all steps, whether all are bitwise equal)."""
    table: dict[str, tuple[float, bool]] = {}
    for seen_a, seen_b in zip(a, b, strict=True):
        assert seen_a.keys() == seen_b.keys(), seen_a.keys() ^ seen_b.keys()
        for name, tensor in seen_a.items():
            group = name.partition("/")[0]
            largest, bitwise = table.get(group, (0.0, True))
            other = seen_b[name]
            assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
            difference = (tensor.double() - other.double()).abs().max().item()
            table[group] = max(largest, difference), bitwise and torch.equal(tensor, other)
    return table


GOLDEN = Path(__file__).parent / "golden" / "moco_reference.npz"
_WHOLE = ("loss", "logits", "queue pointer")
_KEPT_STEPS = (0, 1, 4, 9, 19)


def summary(steps: Iterator[Named]) -> dict[str, np.ndarray]:
    """group -> float64 array: loss, logits and pointer of every step as they are; of the other
    tensors, at some steps, the product with fixed numbers of mean square 1 / size."""
    rows: dict[str, list] = {}
    for step, seen in enumerate(steps):
        groups: dict[str, list] = {}
        for name, tensor in seen.items():
            group = name.partition("/")[0]
            values = tensor.double().flatten().numpy()
            if group not in _WHOLE:
                if step not in _KEPT_STEPS:
                    continue
                mask = uniform(name, 0, len(values)) * (3.0 / len(values)) ** 0.5
                values = np.array([values @ mask])
            groups.setdefault(group, []).append(values)
        for group, values in groups.items():
            rows.setdefault(group, []).append(np.concatenate(values))
    return {group: np.stack(values) for group, values in rows.items()}


def largest_differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """group -> largest absolute difference of two summaries."""
    assert a.keys() == b.keys()
    assert all(a[group].shape == b[group].shape for group in a)
    return {group: float(np.abs(a[group] - b[group]).max()) for group in a}
