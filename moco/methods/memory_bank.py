"""Memory-bank contrast (MoCo v1, figure 2b; Wu et al. 2018, arXiv 1805.01978).

One encoder. Positives and negatives are features stored when their images were last seen: of old
encoders, and no more consistent than an epoch is long. Nothing is computed for the second view.
"""

from __future__ import annotations

import torch

from moco.cfgnode import CfgNode
from moco.contrast.figures import contrast_figures
from moco.contrast.info_nce import info_nce_loss, unit_vectors
from moco.contrast.memory_bank import bank_logits, draw_negatives, initial_bank, update_bank_
from moco.devices import send
from moco.distributed import all_gather_cat
from moco.errors import ConfigError
from moco.methods.base import Method, StepOutput
from moco.models.encoders import build_encoders, encoder_options


class MemoryBank(Method):
    """An encoder and a bank of one feature for every image, updated with momentum.

    Keys are not of the same batch as queries, so batch norm leaks nothing and nothing is shuffled
    (section 3.3).

    Args:
        num_images: M, rows of the bank. num_negatives: K, drawn anew from it in each step, the
            same for all queries of the step.
        bank_momentum: weight of the stored feature in its update.
        temperature: tau. encoder: see `build_encoders`.
    """

    def __init__(
        self,
        *,
        num_images: int,
        num_negatives: int,
        bank_momentum: float,
        temperature: float,
        **encoder,
    ):
        super().__init__()
        self.num_negatives = num_negatives
        self.bank_momentum = bank_momentum
        self.temperature = temperature
        [self.encoder_q] = build_encoders(1, **encoder)
        self.register_buffer("bank", initial_bank(num_images, encoder["dim"]))

    @classmethod
    def from_config(cls, cfg: CfgNode, num_images: int | None = None) -> MemoryBank:
        if num_images is None:
            raise ConfigError("METHOD memory_bank: needs the number of images of the data set")
        return cls(
            num_images=num_images,
            num_negatives=cfg.MEMORY_BANK.NUM_NEGATIVES,
            bank_momentum=cfg.MEMORY_BANK.MOMENTUM,
            temperature=cfg.MOCO.TEMPERATURE,
            **encoder_options(cfg),
        )

    def prepare(self, view_q_BCHW, view_k_BCHW, *, momentum, generator, num_parts=1):
        """The numbers of the step's negatives [K], the same for all micro-batches."""
        negatives = draw_negatives(len(self.bank), self.num_negatives, generator)
        return [send(negatives, self.bank.device)] * num_parts

    def contrast(self, view_q_BCHW, view_k_BCHW, index_B, part, measure) -> StepOutput:
        q_BD = unit_vectors(self.encoder_q(view_q_BCHW))
        logits = bank_logits(q_BD, index_B, self.bank, part, self.temperature)
        figures = contrast_figures(q_BD, logits, temperature=self.temperature) if measure else {}
        return StepOutput(info_nce_loss(logits), figures, keys_VBD=q_BD.detach()[None])

    def after_step(self, output, index_B, skip=None) -> None:
        """Store the step's features after the backward pass, which still reads the old bank."""
        features_ND = all_gather_cat(output.keys_VBD[0])
        update_bank_(self.bank, all_gather_cat(index_B), features_ND, self.bank_momentum, skip)

    def count_negatives(self, global_batch: int) -> int:
        return self.num_negatives

    def transfer_encoder(self) -> torch.nn.Module:
        return self.encoder_q
