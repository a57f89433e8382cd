"""MoCo with the symmetric loss of the reference's CIFAR demo: each view is query and key once."""

from __future__ import annotations

import torch

from moco.contrast.figures import contrast_figures
from moco.contrast.info_nce import unit_vectors
from moco.methods.base import StepOutput
from moco.methods.moco import MoCo
from moco.models.momentum import ema_update_


class SymmetricMoCo(MoCo):
    """MoCo whose loss is the sum of both directions, against one and the same queue.

    A step costs two query passes and two key passes with a permutation each, and stores the keys
    of both views. The sum doubles the gradient at an equal learning rate, as the demo has it.
    """

    views_enqueued = 2

    @torch.no_grad()
    def prepare(self, view_q_BCHW, view_k_BCHW, *, momentum, generator, num_parts=1):
        """Own keys [b, D] of both views, for each micro-batch."""
        ema_update_(
            self.encoder_k, self.encoder_q, momentum, fused=self.fused, compiled=self.compiled
        )
        keys = [self._keys(view, generator, num_parts) for view in (view_q_BCHW, view_k_BCHW)]
        return list(zip(*(k_BD.chunk(num_parts) for k_BD in keys), strict=True))

    def contrast(self, view_q_BCHW, view_k_BCHW, index_B, part, measure) -> StepOutput:
        queries = [unit_vectors(self.encoder_q(view)) for view in (view_q_BCHW, view_k_BCHW)]
        pairs = zip(queries, reversed(part), strict=True)
        losses, logits = zip(*(self._loss(*pair, measure) for pair in pairs), strict=True)
        figures = {}
        if measure:
            all_queries, all_logits = torch.cat(queries), torch.cat(logits)
            figures = contrast_figures(all_queries, all_logits, temperature=self.temperature)
        return StepOutput(loss=sum(losses), metrics=figures, keys_VBD=torch.stack(part))

    def chance_loss(self, global_batch: int) -> float:
        return 2 * super().chance_loss(global_batch)
