"""MoCo v1 and v2 (arXiv 1911.05722, 2003.04297); the two differ by configuration only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moco.cfgnode import CfgNode
from moco.contrast.info_nce import contrast_accuracy, info_nce_logits, info_nce_loss
from moco.contrast.queue import enqueue_, initial_queue
from moco.distributed import all_gather_cat, batch_shuffle, batch_unshuffle, world_size
from moco.methods.base import Method, StepOutput
from moco.models.backbone import build_backbone
from moco.models.heads import replace_by_mlp
from moco.models.momentum import ema_update_, init_key_encoder_


class MoCo(Method):
    """Query encoder, momentum key encoder, and a queue of keys as negatives.

    The state dict has the reference's names and order: encoder_q, encoder_k, queue, queue_ptr.

    Args:
        arch, width, stem, bn_splits: see `build_backbone`.
        dim: D, the dimension of the embedding.
        mlp: the two-layer head of v2; False gives v1's linear one.
        queue_size: K. temperature: tau of InfoNCE.
    """

    def __init__(
        self,
        *,
        arch: str,
        dim: int,
        mlp: bool,
        queue_size: int,
        temperature: float,
        width: float = 1.0,
        stem: str = "imagenet",
        bn_splits: int = 1,
    ):
        super().__init__()
        self.temperature = temperature
        options = {"num_classes": dim, "width": width, "stem": stem, "bn_splits": bn_splits}
        # The order of construction is the reference's, so a seed gives its initial state.
        self.encoder_q = build_backbone(arch, **options)
        self.encoder_k = build_backbone(arch, **options)
        if mlp:
            replace_by_mlp(self.encoder_q)
            replace_by_mlp(self.encoder_k)
        init_key_encoder_(self.encoder_k, self.encoder_q)
        self.register_buffer("queue", initial_queue(dim, queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> MoCo:
        return cls(
            arch=cfg.MODEL.ARCH,
            dim=cfg.MODEL.DIM,
            mlp=cfg.MODEL.HEAD == "mlp",
            queue_size=cfg.MOCO.QUEUE_SIZE,
            temperature=cfg.MOCO.TEMPERATURE,
            width=cfg.MODEL.WIDTH,
            stem=cfg.MODEL.STEM,
            bn_splits=cfg.MODEL.BN_SPLITS,
        )

    def forward(self, view_q_BCHW, view_k_BCHW, index_B, *, momentum, generator) -> StepOutput:
        q_BD = F.normalize(self.encoder_q(view_q_BCHW).float(), dim=1)
        with torch.no_grad():
            ema_update_(self.encoder_k, self.encoder_q, momentum)
            k_BD = self._keys(view_k_BCHW, generator)
        logits = info_nce_logits(q_BD, k_BD, self.queue, self.temperature)
        return StepOutput(
            loss=info_nce_loss(logits),
            metrics=contrast_accuracy(logits),
            keys_ND=all_gather_cat(k_BD),
        )

    def _keys(self, view_k_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Keys of this process's images, computed in a shuffled batch (shuffle BN)."""
        permutation = torch.randperm(len(view_k_BCHW) * world_size(), generator=generator)
        shuffled = batch_shuffle(view_k_BCHW, permutation)
        k_BD = F.normalize(self.encoder_k(shuffled).float(), dim=1)
        return batch_unshuffle(k_BD, permutation)

    def after_step(self, output: StepOutput, index_B: torch.Tensor) -> None:
        """Enqueue the keys after the backward pass, which still reads the old queue."""
        enqueue_(self.queue, self.queue_ptr, output.keys_ND)

    def transfer_encoder(self) -> torch.nn.Module:
        return self.encoder_q
