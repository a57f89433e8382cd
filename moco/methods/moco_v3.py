"""MoCo v3 (arXiv 2104.02057, algorithm 1): no queue, a predictor, a symmetric in-batch loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moco.cfgnode import CfgNode
from moco.contrast.figures import contrast_figures
from moco.contrast.info_nce import in_batch_logits, unit_vectors
from moco.distributed import all_gather_cat, rank
from moco.errors import ConfigError
from moco.methods.base import Method, StepOutput
from moco.models.encoders import backbone_options, build_encoder
from moco.models.heads import mlp_with_norm
from moco.models.momentum import ema_update_, init_key_encoder_


class MoCoV3(Method):
    """Query encoder (backbone, projector) with a predictor, and a momentum key encoder without.

    The projector is the encoder's `fc`, so the backbone alone is `forward_features`. Negatives are
    the other images' keys of the global batch. The moving average is taken as a step begins, which
    is the sequence of the paper's, taken as a step ends; a checkpoint's key encoder lags behind by
    one step, as in v1 and v2.

    Args:
        dim: D of queries and keys. hidden_dim, projector_layers, predictor_layers: of the heads.
        temperature: tau. backbone: see `build_encoder`.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        projector_layers: int,
        predictor_layers: int,
        temperature: float,
        **backbone,
    ):
        super().__init__()
        self.temperature = temperature
        norm = backbone["norm"]
        self.encoder_q, self.encoder_k = (
            build_encoder(num_classes=dim, **backbone) for _ in range(2)
        )
        hidden = [hidden_dim] * (projector_layers - 1)
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.fc = mlp_with_norm([encoder.fc.in_features, *hidden, dim], norm=norm)
        hidden = [hidden_dim] * (predictor_layers - 1)
        self.predictor = mlp_with_norm([dim, *hidden, dim], norm=norm)
        init_key_encoder_(self.encoder_k, self.encoder_q)

    @classmethod
    def from_config(cls, cfg: CfgNode, num_images: int | None = None) -> MoCoV3:
        if cfg.MODEL.BN_SPLITS > 1:
            raise ConfigError(
                f"MODEL.BN_SPLITS {cfg.MODEL.BN_SPLITS}: METHOD moco_v3 has no shuffle BN that "
                "groups would serve; set it to 1 (the paper's batch norm is MODEL.NORM SyncBN)"
            )
        heads = cfg.MOCO_V3
        return cls(
            dim=cfg.MODEL.DIM,
            hidden_dim=heads.HIDDEN_DIM,
            projector_layers=heads.PROJECTOR_LAYERS,
            predictor_layers=heads.PREDICTOR_LAYERS,
            temperature=cfg.MOCO.TEMPERATURE,
            **backbone_options(cfg),
        )

    @torch.no_grad()
    def prepare(self, view_q_BCHW, view_k_BCHW, *, momentum, generator, num_parts=1):
        """All processes' keys [N, D] of both views, and the number in the global batch of each
        micro-batch's first image."""
        ema_update_(self.encoder_k, self.encoder_q, momentum)
        keys = []
        for view in (view_q_BCHW, view_k_BCHW):
            parts = [unit_vectors(self.encoder_k(images)) for images in view.chunk(num_parts)]
            keys.append(all_gather_cat(torch.cat(parts)))
        num_images = len(view_q_BCHW)
        first = rank() * num_images
        return [(keys, first + part * num_images // num_parts) for part in range(num_parts)]

    def contrast(self, view_q_BCHW, view_k_BCHW, index_B, part, measure) -> StepOutput:
        keys, first = part
        # The two crops are normalised apart (appendix A, "BatchNorm").
        queries = [
            unit_vectors(self.predictor(self.encoder_q(view)))
            for view in (view_q_BCHW, view_k_BCHW)
        ]
        pairs = [
            in_batch_logits(q_BD, k_ND, first, self.temperature)
            for q_BD, k_ND in zip(queries, reversed(keys), strict=True)
        ]
        losses = [F.cross_entropy(logits, labels) for logits, labels in pairs]
        figures = {}
        if measure:
            logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            features = torch.cat(queries)
            figures = contrast_figures(features, logits, labels, temperature=self.temperature)
        return StepOutput(loss=2 * self.temperature * sum(losses), metrics=figures)

    def chance_loss(self, global_batch: int) -> float:
        return 2 * self.temperature * 2 * super().chance_loss(global_batch)

    def count_negatives(self, global_batch: int) -> int:
        return global_batch - 1

    def transfer_encoder(self) -> torch.nn.Module:
        return self.encoder_q
