"""The queue against a deque, wrap included."""

from collections import deque

import pytest
import torch

from moco.contrast.queue import enqueue_, initial_queue


@pytest.mark.parametrize("queue_size, batch", [(12, 4), (10, 4), (7, 7), (7, 3), (5, 1)])
def test_equals_a_deque(queue_size, batch):
    queue, pointer = torch.zeros(2, queue_size), torch.zeros(1, dtype=torch.long)
    oracle = deque([[0.0, 0.0]] * queue_size, maxlen=queue_size)
    for step in range(9):
        keys = torch.arange(step * batch, (step + 1) * batch)[:, None] + torch.tensor([0.25, 0.5])
        enqueue_(queue, pointer, keys)
        oracle.extend(keys.tolist())
        oldest = int(pointer)
        in_order = torch.cat([queue[:, oldest:], queue[:, :oldest]], 1).T.tolist()
        assert in_order == list(oracle)
        assert oldest == (step + 1) * batch % queue_size


def test_more_keys_than_the_queue_holds_are_refused():
    with pytest.raises(ValueError, match="5 keys do not fit a queue of 4"):
        enqueue_(torch.zeros(2, 4), torch.zeros(1, dtype=torch.long), torch.ones(5, 2))


def test_initial_columns_are_unit_vectors():
    torch.testing.assert_close(initial_queue(16, 9).norm(dim=0), torch.ones(9))
