"""A linear classifier on an encoder: frozen, or fine-tuned together with it.

Shapes: B images of this process, N of the global batch, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from moco import distributed
from moco.data.augment import normalize
from moco.distributed import ProcessInfo
from moco.seeding import torch_generator


def new_classifier(num_features: int, num_classes: int, std: float, seed: int) -> nn.Linear:
    """fc with weights ~ N(0, std) and bias 0 (main_lincls.py): a function of the seed alone."""
    fc = nn.Linear(num_features, num_classes)
    with torch.no_grad():
        fc.weight.normal_(0.0, std, generator=torch_generator(seed, "linear-init"))
        fc.bias.zero_()
    return fc


class Classifier:
    """An encoder whose `fc` has one output a class, on the process's device.

    Args:
        encoder: with `forward_features` and the new `fc`.
        finetune: train the whole encoder; else the backbone is frozen in eval mode and no
            gradient reaches it.
        amp: bfloat16 autocast in the backbone; `fc` keeps its own type.
        channels_last: memory format of the backbone.
    """

    def __init__(
        self,
        encoder: nn.Module,
        process: ProcessInfo,
        *,
        finetune: bool = False,
        amp: bool = False,
        channels_last: bool = False,
    ):
        self.process, self.finetune, self.amp = process, finetune, amp
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder = encoder.to(process.device, memory_format=self.memory_format)
        if not finetune:
            self.encoder.requires_grad_(False)
            self.encoder.fc.requires_grad_(True)
        self.encoder.eval()
        self._trained: nn.Module = _Whole(self.encoder) if finetune else self.encoder.fc
        if process.world_size > 1:
            distributed.broadcast_state(self.encoder)
            self._trained = distributed.data_parallel(self._trained, process)

    def parameter_groups(self, lr: float, backbone_lr: float) -> list[dict]:
        """For torch.optim: `fc` alone, or the backbone and then `fc`, each with its rate."""
        head = list(self.encoder.fc.parameters())
        if not self.finetune:
            return [{"params": head, "lr": lr}]
        own = {id(parameter) for parameter in head}
        others = [p for p in self.encoder.parameters() if id(p) not in own and p.requires_grad]
        return [{"params": others, "lr": backbone_lr}, {"params": head, "lr": lr}]

    def train_logits(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C] with gradient. A frozen backbone stays in eval mode, its batch norm included."""
        images_BCHW = self._as_input(images_BCHW)
        if self.finetune:
            self.encoder.train()
            with self._autocast():
                return self._trained(images_BCHW)
        with torch.no_grad(), self._autocast():
            features_BD = self.encoder.forward_features(images_BCHW)
        return self._trained(features_BD.to(self.encoder.fc.weight.dtype))

    @torch.no_grad()
    def test_logits(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C] in eval mode, in every process by itself."""
        self.encoder.eval()
        with self._autocast():
            features_BD = self.encoder.forward_features(self._as_input(images_BCHW))
        return self.encoder.fc(features_BD.to(self.encoder.fc.weight.dtype))

    def _as_input(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.to(self.encoder.fc.weight.dtype, memory_format=self.memory_format)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, dtype=torch.bfloat16, enabled=self.amp)


class _Whole(nn.Module):
    """Backbone under the surrounding autocast, then `fc` in its own type."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features_BD = self.encoder.forward_features(images_BCHW)
        with torch.autocast(features_BD.device.type, enabled=False):
            return self.encoder.fc(features_BD.to(self.encoder.fc.weight.dtype))


@dataclass(frozen=True)
class StepResult:
    """loss: mean over this process's images, detached; top1: their share that is right, in
    percent."""

    loss: torch.Tensor
    top1: torch.Tensor


def classify_step(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    images_BCHW: torch.Tensor,
    label_B: torch.Tensor,
    *,
    num_own: int,
    num_global: int,
    settle: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
) -> StepResult:
    """Forward, backward and update, by the mean cross-entropy over the global batch.

    Args:
        images_BCHW: normalised, on the device. label_B: int64.
        num_own: how many of them count (0: none, where the batch has fewer images than there are
            processes). num_global: of the whole batch.
        settle: called with the loss before the update; raises where it must not be made, or gives
            what an optimizer's `found_inf` is to be (`StepGuard.check`).
    """
    logits_BC = classifier.train_logits(images_BCHW)
    loss = F.cross_entropy(logits_BC, label_B)
    optimizer.zero_grad(set_to_none=True)
    # DistributedDataParallel averages over processes: with this weight the average is the mean
    # over images, however unevenly they are shared out.
    weight = num_own * classifier.process.world_size / num_global
    (loss if weight == 1.0 else loss * weight).backward()
    loss = loss.detach()
    skip = None if settle is None else settle(loss)
    optimizer.found_inf = None if skip is None else skip.float()
    optimizer.step()
    right = (logits_BC.detach().argmax(dim=1) == label_B).float().mean()
    return StepResult(loss, 100.0 * right)


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent and mean loss over `num_images` test images of all processes."""

    top1: float
    top5: float
    loss: float
    num_images: int


def count_correct(logits_BC: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """How many labels are the highest output, and among the five highest (all, with fewer):
    float32 [2] on their device, exact below 2^24."""
    best_BK = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
    right_BK = best_BK == label_B[:, None]
    return torch.stack([right_BK[:, 0].sum(), right_BK.any(dim=1).sum()]).float()


def score(
    classifier: Classifier,
    loader: Iterable,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Scores:
    """Scores over the loaders of all processes together, each `build_eval_loader`'s share."""
    device = classifier.process.device
    found, num_images = [], 0
    for images_BCHW, label_B, _ in loader:
        images_BCHW = normalize(images_BCHW.to(device, non_blocking=True), mean, std)
        label_B = label_B.to(device, non_blocking=True)
        logits_BC = classifier.test_logits(images_BCHW)
        loss = F.cross_entropy(logits_BC, label_B, reduction="sum")
        found.append(torch.cat([count_correct(logits_BC, label_B), loss[None]]))
        num_images += len(label_B)
    totals = torch.zeros(4, dtype=torch.float64)
    totals[3] = num_images
    if found:  # read once, and added in order: any other sum may differ in its last digit
        for of_batch in torch.stack(found).cpu().double():
            totals[:3] += of_batch
    if distributed.world_size() > 1:
        totals = distributed.all_reduce_sum(totals.to(device))
    top1, top5, loss, count = totals.tolist()
    return Scores(100.0 * top1 / count, 100.0 * top5 / count, loss / count, int(count))
