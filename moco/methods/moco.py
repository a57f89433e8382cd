"""MoCo v1 and v2 (arXiv 1911.05722, 2003.04297); the two differ by configuration only."""

from __future__ import annotations

import torch

from moco.cfgnode import CfgNode
from moco.contrast.figures import contrast_figures
from moco.contrast.fused import fused_info_nce
from moco.contrast.info_nce import info_nce_logits, info_nce_loss, unit_vectors
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
        fused: compute loss and moving average in one pass each, not in the reference's form.
        encoder: see `build_encoders`; `dim` is D, `mlp` tells v2 from v1.
    """

    shuffles_keys = True
    views_enqueued = 1  # keys a step stores for each image

    def __init__(self, *, queue_size: int, temperature: float, fused: bool = False, **encoder):
        super().__init__()
        self.temperature, self.fused = temperature, fused
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
            fused=not cfg.TRAIN.REFERENCE,
            **encoder_options(cfg),
        )

    @torch.no_grad()
    def prepare(self, view_q_BCHW, view_k_BCHW, *, momentum, generator, num_parts=1):
        """Own keys [b, D] of each micro-batch. The queries' forward reads nothing the average
        writes, so keys may be made first; then their activations are gone before those of the
        queries are kept."""
        ema_update_(
            self.encoder_k, self.encoder_q, momentum, fused=self.fused, compiled=self.compiled
        )
        return self._keys(view_k_BCHW, generator, num_parts).chunk(num_parts)

    def contrast(self, view_q_BCHW, view_k_BCHW, index_B, part, measure) -> StepOutput:
        q_BD, k_BD = unit_vectors(self.encoder_q(view_q_BCHW)), part
        loss, logits = self._loss(q_BD, k_BD, measure)
        figures = contrast_figures(q_BD, logits, temperature=self.temperature) if measure else {}
        return StepOutput(loss=loss, metrics=figures, keys_VBD=k_BD[None])

    def _loss(
        self, q_BD: torch.Tensor, k_BD: torch.Tensor, measure: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss against the queue, and the logits where they are measured or were needed for it."""
        if not self.fused:
            logits = info_nce_logits(q_BD, k_BD, self.queue, self.temperature)
            return info_nce_loss(logits), logits
        logits = None
        if measure:
            logits = info_nce_logits(q_BD.detach(), k_BD, self.queue, self.temperature)
        loss = fused_info_nce(q_BD, k_BD, self.queue, self.temperature, compiled=self.compiled)
        return loss, logits

    def _keys(
        self, view_k_BCHW: torch.Tensor, generator: torch.Generator, num_parts: int
    ) -> torch.Tensor:
        """Keys of this process's images, computed in a shuffled global batch (shuffle BN) of which
        batch norm sees one micro-batch at a time."""
        permutation = torch.randperm(len(view_k_BCHW) * world_size(), generator=generator)
        shuffled = batch_shuffle(view_k_BCHW, permutation)
        with torch.inference_mode():
            keys = [unit_vectors(self.encoder_k(images)) for images in shuffled.chunk(num_parts)]
        # Joined outside, they are ordinary tensors, which autograd may keep.
        return batch_unshuffle(torch.cat(keys), permutation)

    def after_step(self, output, index_B, skip=None) -> None:
        """Enqueue the keys of all processes, in the order of their ranks, after the backward pass,
        which still reads the old queue."""
        for keys_BD in output.keys_VBD:
            enqueue_(self.queue, self.queue_ptr, all_gather_cat(keys_BD), skip)

    def count_negatives(self, global_batch: int) -> int:
        return self.queue.shape[1]

    def transfer_encoder(self) -> torch.nn.Module:
        return self.encoder_q
