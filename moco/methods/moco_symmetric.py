"""MoCo with the symmetric loss of the reference's CIFAR demo: each view is query and key once."""

from __future__ import annotations

import torch

from moco.contrast.info_nce import (
    contrast_accuracy,
    info_nce_logits,
    info_nce_loss,
    unit_vectors,
)
from moco.distributed import all_gather_cat
from moco.methods.base import StepOutput
from moco.methods.moco import MoCo
from moco.models.momentum import ema_update_


class SymmetricMoCo(MoCo):
    """MoCo whose loss is the sum of both directions, against one and the same queue.

    A step costs two query passes and two key passes with a permutation each, and stores the keys
    of both views. The sum doubles the gradient at an equal learning rate, as the demo has it.
    """

    views_enqueued = 2

    def forward(self, view_q_BCHW, view_k_BCHW, index_B, *, momentum, generator) -> StepOutput:
        queries = [unit_vectors(self.encoder_q(view)) for view in (view_q_BCHW, view_k_BCHW)]
        with torch.no_grad():
            ema_update_(self.encoder_k, self.encoder_q, momentum)
            keys = [self._keys(view, generator) for view in (view_q_BCHW, view_k_BCHW)]
        logits = [
            info_nce_logits(q_BD, k_BD, self.queue, self.temperature)
            for q_BD, k_BD in zip(queries, reversed(keys), strict=True)
        ]
        return StepOutput(
            loss=sum(map(info_nce_loss, logits)),
            metrics=contrast_accuracy(torch.cat(logits)),
            keys_ND=torch.cat([all_gather_cat(k_BD) for k_BD in keys]),
        )
