"""What the training loop asks of a method."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn


@dataclass
class StepOutput:
    """The result of one step, or of one micro-batch of it, on this process.

    loss: scalar with gradient; metrics: detached scalars to log; keys_VBD: this process's own keys
    of V views, which `after_step` stores, None where nothing is stored.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    keys_VBD: torch.Tensor | None = None


class Method(nn.Module, abc.ABC):
    """Base of the mechanisms. All state is in parameters and persistent buffers.

    A step is `prepare` once, then `forward` and backward for each micro-batch, then `after_step`
    once. The micro-batches of all processes are virtual ranks: W processes with A of them each
    compute what W * A processes with one each would.

    shuffles_keys: whether keys are computed in a shuffled batch (shuffle BN). Then batch norm has
        to see groups of the global batch: several processes, or MODEL.BN_SPLITS.
    """

    shuffles_keys = False
    compiled = False  # compute by kernels; see moco.kernels.choose

    @abc.abstractmethod
    def prepare(
        self,
        view_q_BCHW: torch.Tensor,
        view_k_BCHW: torch.Tensor,
        *,
        momentum: float,
        generator: torch.Generator,
        num_parts: int = 1,
    ) -> Sequence[Any]:
        """What a step needs before its first query: the moved key encoder, and all keys.

        Args:
            view_q_BCHW, view_k_BCHW: two augmented, normalised views of this process's images.
            momentum: of the key encoder in this step.
            generator: draws of this step; equal on all processes.
            num_parts: A, equal runs of the B images that are contrasted one after the other.
        Returns: the `part` argument of each of the A calls of `forward`.
        """

    @abc.abstractmethod
    def contrast(
        self,
        view_q_BCHW: torch.Tensor,
        view_k_BCHW: torch.Tensor,
        index_B: torch.Tensor,
        part: Any,
        measure: bool,
    ) -> StepOutput:
        """`forward` with what `prepare` gave."""

    def forward(
        self,
        view_q_BCHW: torch.Tensor,
        view_k_BCHW: torch.Tensor,
        index_B: torch.Tensor,
        *,
        part: Any = None,
        measure: bool = True,
        momentum: float | None = None,
        generator: torch.Generator | None = None,
    ) -> StepOutput:
        """Mean loss of these images.

        Args:
            view_q_BCHW, view_k_BCHW: the images' two views, part of those given to `prepare`.
            index_B: the images' numbers in the data set.
            part: the entry of `prepare` for these images. None makes the images the whole step of
                this process: it is prepared here, with `momentum` and `generator`.
            measure: whether to compute the metrics too.
        """
        if part is None:
            [part] = self.prepare(view_q_BCHW, view_k_BCHW, momentum=momentum, generator=generator)
        return self.contrast(view_q_BCHW, view_k_BCHW, index_B, part, measure)

    def after_step(
        self, output: StepOutput, index_B: torch.Tensor, skip: torch.Tensor | None = None
    ) -> None:
        """Store what later steps contrast against.

        Args:
            output: of all images of this process, B of them, numbered `index_B`.
            skip: a scalar on the device; where it is true nothing is stored. It is what a GPU
                is given whose findings (NaN or Inf in the step) the process has not read yet.
        """

    @abc.abstractmethod
    def count_negatives(self, global_batch: int) -> int:
        """How many negatives a query is told apart from, in a step of `global_batch` images."""

    def chance_loss(self, global_batch: int) -> float:
        """The loss where all similarities are equal: what is reached without learning anything."""
        return math.log(1 + self.count_negatives(global_batch))

    @abc.abstractmethod
    def transfer_encoder(self) -> nn.Module:
        """The encoder that kNN, linear classification and the converter read."""
