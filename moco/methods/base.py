"""What the training loop asks of a method."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

import torch
import torch.nn as nn


@dataclass
class StepOutput:
    """One step's result on this process.

    loss: scalar with gradient; metrics: detached scalars to log; keys_ND: the step's keys of all
    processes, which `after_step` stores.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    keys_ND: torch.Tensor | None = None


class Method(nn.Module, abc.ABC):
    """Base of the mechanisms. All state is in parameters and persistent buffers.

    shuffles_keys: whether keys are computed in a shuffled batch (shuffle BN). Then batch norm has
        to see groups of the global batch: several processes, or MODEL.BN_SPLITS.
    """

    shuffles_keys = False

    @abc.abstractmethod
    def forward(
        self,
        view_q_BCHW: torch.Tensor,
        view_k_BCHW: torch.Tensor,
        index_B: torch.Tensor,
        *,
        momentum: float,
        generator: torch.Generator,
    ) -> StepOutput:
        """Loss of one step.

        Args:
            view_q_BCHW, view_k_BCHW: two augmented, normalised views of the same images.
            index_B: the images' numbers in the data set.
            momentum: of the key encoder in this step.
            generator: draws of this step; equal on all processes.
        """

    def after_step(self, output: StepOutput, index_B: torch.Tensor) -> None:
        """Store what later steps contrast against; called once the update is known to be finite."""

    @abc.abstractmethod
    def count_negatives(self, global_batch: int) -> int:
        """How many negatives a query is told apart from, in a step of `global_batch` images."""

    @abc.abstractmethod
    def transfer_encoder(self) -> nn.Module:
        """The encoder that kNN, linear classification and the converter read."""
