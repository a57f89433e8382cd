"""MoCo v1 and v2 (arXiv 1911.05722, 2003.04297); the two differ by configuration only."""

from __future__ import annotations

import torch

from moco.cfgnode import CfgNode
from moco.contrast.info_nce import (
    contrast_accuracy,
    info_nce_logits,
    info_nce_loss,
    unit_vectors,
)
from moco.contrast.queue import enqueue_, initial_queue
from moco.distributed import all_gather_cat, batch_shuffle, batch_unshuffle, world_size
from moco.errors import ConfigError
from moco.methods.base import Method, StepOutput
from moco.models.encoders import build_encoders, encoder_options
from moco.models.momentum import ema_update_, init_key_encoder_


class MoCo(Method):
    """Query encoder, momentum key encoder, and a queue of keys as negatives.

    The state dict has the reference's names and order: encoder_q, encoder_k, queue, queue_ptr.

    Args:
        queue_size: K. temperature: tau of InfoNCE.
        encoder: see `build_encoders`; `dim` is D, `mlp` tells v2 from v1.
    """

    shuffles_keys = True
    views_enqueued = 1  # keys a step stores for each image

    def __init__(self, *, queue_size: int, temperature: float, **encoder):
        super().__init__()
        self.temperature = temperature
        # The order of construction is the reference's, so a seed gives its initial state.
        self.encoder_q, self.encoder_k = build_encoders(2, **encoder)
        init_key_encoder_(self.encoder_k, self.encoder_q)
        self.register_buffer("queue", initial_queue(encoder["dim"], queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @classmethod
    def from_config(cls, cfg: CfgNode, num_images: int | None = None) -> MoCo:
        keys = cls.views_enqueued * cfg.TRAIN.BATCH_SIZE
        if cfg.MOCO.QUEUE_SIZE < keys:
            raise ConfigError(
                f"MOCO.QUEUE_SIZE {cfg.MOCO.QUEUE_SIZE} does not hold the {keys} keys of one step "
                f"(TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE}); raise the one or lower the other"
            )
        return cls(
            queue_size=cfg.MOCO.QUEUE_SIZE,
            temperature=cfg.MOCO.TEMPERATURE,
            **encoder_options(cfg),
        )

    def forward(self, view_q_BCHW, view_k_BCHW, index_B, *, momentum, generator) -> StepOutput:
        q_BD = unit_vectors(self.encoder_q(view_q_BCHW))
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
        k_BD = unit_vectors(self.encoder_k(shuffled))
        return batch_unshuffle(k_BD, permutation)

    def after_step(self, output: StepOutput, index_B: torch.Tensor) -> None:
        """Enqueue the keys after the backward pass, which still reads the old queue."""
        enqueue_(self.queue, self.queue_ptr, output.keys_ND)

    def count_negatives(self, global_batch: int) -> int:
        return self.queue.shape[1]

    def transfer_encoder(self) -> torch.nn.Module:
        return self.encoder_q
