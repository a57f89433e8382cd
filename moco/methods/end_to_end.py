"""End-to-end contrast (MoCo v1, figure 2a): the keys' encoder is trained by gradient too.

The negatives of a query are the other images of the global batch. With one encoder for both views
and the symmetric NT-Xent loss it is SimCLR's mechanism (arXiv 2002.05709).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moco.cfgnode import CfgNode
from moco.contrast.figures import contrast_figures
from moco.contrast.info_nce import in_batch_logits, nt_xent_logits, unit_vectors
from moco.devices import send
from moco.distributed import all_gather_with_gradient, batch_shuffle, rank, world_size
from moco.errors import ConfigError
from moco.methods.base import Method, StepOutput
from moco.models.encoders import build_encoders, encoder_options


class EndToEnd(Method):
    """Two encoders, both trained by gradient, or one for queries and keys.

    Keys are computed in a shuffled batch, as the paper does for this mechanism too (section 3.3).

    Args:
        loss: "info_nce" (queries against keys) or "nt_xent" (both views against all views).
        share_encoder: one encoder; else two that start equal.
        temperature: tau. encoder: see `build_encoders`.
    """

    shuffles_keys = True

    def __init__(self, *, loss: str, share_encoder: bool, temperature: float, **encoder):
        super().__init__()
        self.temperature = temperature
        self.symmetric = loss == "nt_xent"
        self.encoder_q, *others = build_encoders(1 if share_encoder else 2, **encoder)
        self.encoder_k = None
        if others:
            self.encoder_k = others[0]
            self.encoder_k.load_state_dict(self.encoder_q.state_dict())

    @classmethod
    def from_config(cls, cfg: CfgNode, num_images: int | None = None) -> EndToEnd:
        steps = cfg.TRAIN.ACCUMULATION_STEPS
        if steps > 1:
            raise ConfigError(
                f"TRAIN.ACCUMULATION_STEPS {steps}: METHOD end_to_end allows 1 only. Its negatives "
                "are the global batch's other images, with gradient, so the activations of all "
                "are needed at once; lower TRAIN.BATCH_SIZE or start more processes"
            )
        return cls(
            loss=cfg.END_TO_END.LOSS,
            share_encoder=cfg.END_TO_END.SHARE_ENCODER,
            temperature=cfg.MOCO.TEMPERATURE,
            **encoder_options(cfg),
        )

    def prepare(self, view_q_BCHW, view_k_BCHW, *, momentum, generator, num_parts=1):
        """The permutation of shuffle BN; keys have a gradient, so they are made in `contrast`."""
        assert num_parts == 1, "refused by from_config"
        return [torch.randperm(len(view_k_BCHW) * world_size(), generator=generator)]

    def contrast(self, view_q_BCHW, view_k_BCHW, index_B, part, measure) -> StepOutput:
        q_BD = unit_vectors(self.encoder_q(view_q_BCHW))
        k_ND = self._all_keys(view_k_BCHW, permutation=part)
        first = rank() * len(q_BD)
        if self.symmetric:
            q_ND, k_BD = all_gather_with_gradient(q_BD), k_ND[first : first + len(q_BD)]
            logits, labels = nt_xent_logits(q_BD, k_BD, q_ND, k_ND, first, self.temperature)
        else:
            logits, labels = in_batch_logits(q_BD, k_ND, first, self.temperature)
        figures = {}
        if measure:
            figures = contrast_figures(q_BD, logits, labels, temperature=self.temperature)
        return StepOutput(loss=F.cross_entropy(logits, labels), metrics=figures)

    def _all_keys(self, view_k_BCHW: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
        """Keys of all processes [N, D] in the order of the images, with gradient."""
        encoder = self.encoder_q if self.encoder_k is None else self.encoder_k
        k_BD = unit_vectors(encoder(batch_shuffle(view_k_BCHW, permutation)))
        inverse = send(torch.argsort(permutation), k_BD.device)
        return all_gather_with_gradient(k_BD)[inverse]

    def count_negatives(self, global_batch: int) -> int:
        return (2 if self.symmetric else 1) * (global_batch - 1)

    def transfer_encoder(self) -> torch.nn.Module:
        return self.encoder_q
