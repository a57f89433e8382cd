"""The next batch travels to the GPU while the current one is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

_ON_DEVICE = 3  # tensors of a batch: view_q, view_k, index


def ahead_on_device(
    batches: Iterable[Sequence[torch.Tensor]], device: torch.device
) -> Iterator[Sequence[torch.Tensor]]:
    """The same batches in the same order; on a GPU their images are copied there one step ahead.

    Copies of one stream wait for the computation before them, so they get a stream of their own.
    They overlap only from pinned memory, in which the loader puts batches for a GPU. Elsewhere
    the batches pass as they are. The first three tensors of a batch travel, views and numbers: the
    device backend's tables of parameters after them are read on the CPU.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = [tensor.to(device, non_blocking=True) for tensor in batch[:_ON_DEVICE]]
            arrived = stream.record_event()
        if waiting is not None:
            yield _received(*waiting)
        waiting = [*copied, *batch[_ON_DEVICE:]], arrived
    if waiting is not None:
        yield _received(*waiting)


def _received(batch: list[torch.Tensor], arrived: torch.cuda.Event) -> list[torch.Tensor]:
    """The batch, for the current stream: it waits, and memory is not reused before it is done."""
    current = torch.cuda.current_stream()
    current.wait_event(arrived)
    for tensor in batch:
        if tensor.is_cuda:
            tensor.record_stream(current)
    return batch
