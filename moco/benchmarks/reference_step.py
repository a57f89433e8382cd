"""A training step done as the public MoCo code does it: the baseline of the step's measurements.

Written from a description of facebookresearch/moco (commit 7397dfe; its builder and training
script), for one process: float32, channels first, nothing compiled, torchvision's networks, the
moving average in a loop over parameters, keys in permuted order, a copy of the queue, all logits
joined, top-1 and top-5 accuracy and the loss's value in every step, torch's default SGD.
`tests/moco/benchmarks/test_reference_step.py` shows that it computes what TRAIN.REFERENCE does, to
the last bit, and so what the public code does (docs/COMPATIBILITY.md).
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from moco.cfgnode import CfgNode
from moco.models.encoders import build_encoder, encoder_options
from moco.models.heads import replace_by_mlp


class ReferenceStep(nn.Module):
    """Encoders, queue and optimizer, and one step over them.

    Args:
        cfg: a pretraining configuration of METHOD moco.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.temperature = cfg.MOCO.TEMPERATURE
        self.encoder_q, self.encoder_k = reference_networks(cfg)
        for key, query in zip(
            self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True
        ):
            key.data.copy_(query.data)
            key.requires_grad = False
        noise = torch.randn(cfg.MODEL.DIM, cfg.MOCO.QUEUE_SIZE)
        self.register_buffer("queue", F.normalize(noise, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        train = cfg.TRAIN
        self.optimizer = torch.optim.SGD(
            self.parameters(), train.LR, momentum=train.SGD_MOMENTUM,
            weight_decay=train.WEIGHT_DECAY,
        )  # fmt: skip

    def step(
        self,
        images_q_BCHW: torch.Tensor,
        images_k_BCHW: torch.Tensor,
        *,
        momentum: float,
        generator: torch.Generator | None = None,
    ) -> tuple[float, float, float]:
        """One update. Returns: loss, top-1 and top-5 accuracy in percent.

        Args:
            images_q_BCHW, images_k_BCHW: float32, normalised.
            generator: of the permutation; None for torch's own.
        """
        logits, labels = self._logits(images_q_BCHW, images_k_BCHW, momentum, generator)
        loss = F.cross_entropy(logits, labels)
        top1, top5 = (hits.item() for hits in _accuracies(logits, labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), top1, top5

    def _logits(self, images_q, images_k, momentum, generator):
        queries = F.normalize(self.encoder_q(images_q), dim=1)
        with torch.no_grad():
            self._move_key_encoder(momentum)
            order = torch.randperm(len(images_k), generator=generator).to(images_k.device)
            keys = F.normalize(self.encoder_k(images_k[order]), dim=1)[torch.argsort(order)]
        own = torch.einsum("bd,bd->b", queries, keys)[:, None]
        others = torch.einsum("bd,dk->bk", queries, self.queue.clone().detach())
        logits = torch.cat([own, others], dim=1)
        logits /= self.temperature
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        self._store(keys)
        return logits, labels

    @torch.no_grad()
    def _move_key_encoder(self, momentum: float) -> None:
        pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        for key, query in pairs:
            key.data = momentum * key.data + (1.0 - momentum) * query.data

    @torch.no_grad()
    def _store(self, keys_BD: torch.Tensor) -> None:
        first, size = int(self.queue_ptr), self.queue.shape[1]
        assert size % len(keys_BD) == 0, "the public code wants a queue of whole batches"
        self.queue[:, first : first + len(keys_BD)] = keys_BD.T
        self.queue_ptr[0] = (first + len(keys_BD)) % size


def reference_networks(cfg: CfgNode) -> list[nn.Module]:
    """Query and key network: torchvision's own where it has the form; ours for the CIFAR stem,
    split batch norm and other widths, which the public code takes from elsewhere."""
    model = cfg.MODEL
    if model.STEM == "imagenet" and model.BN_SPLITS == 1 and model.WIDTH == 1.0:
        kind = getattr(torchvision.models, model.ARCH)
        networks = [kind(num_classes=model.DIM) for _ in range(2)]
    else:
        options = encoder_options(cfg)
        dim, _ = options.pop("dim"), options.pop("mlp")
        networks = [build_encoder(num_classes=dim, **options) for _ in range(2)]
    if model.HEAD == "mlp":
        for network in networks:
            replace_by_mlp(network)
    return networks


@torch.no_grad()
def _accuracies(logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    most = min(5, logits.shape[1])
    found = logits.topk(most, dim=1).indices == labels[:, None]
    return [found[:, :k].any(1).float().mean() * 100 for k in (1, 5)]
