"""The pretend GPU itself: what it sees, what it lets pass, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch

from moco.devices import send
from support.pretend_cuda import DEVICE, MixedDevices, is_on_device, pretend_cuda


def on_device(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE)


FLAGS = torch.tensor([True, False, True])
# Each waits once on a GPU; the rules are in torch's sources.
WAITS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t[0] > 0),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "nonzero": lambda t: t.nonzero(),
    "where": lambda t: torch.where(t > 0),
    "mask": lambda t: t[t > 0],
    "CPU values": lambda t: t.new_tensor([1.0]),
    "tensor": lambda t: torch.tensor([1.0], device=DEVICE),
    "blocking copy": lambda t: torch.ones(3).to(DEVICE),
    "not pinned": lambda t: torch.ones(3).to(DEVICE, non_blocking=True),
    "scalar by index": lambda t: t.__setitem__(torch.arange(2, device=DEVICE), 2.0),
    "repeat": lambda t: torch.repeat_interleave(t, torch.ones_like(t).long()),
    "event": lambda t: torch.cuda.synchronize(),
}
# None of these does.
FREE = {
    "arithmetic": lambda t: (t + 1).sum() * 2,
    "pinned": lambda t: send(torch.ones(3), DEVICE),
    "masked fill": lambda t: t.__setitem__(t > 0, 2.0),
    "index": lambda t: t[torch.arange(2, device=DEVICE)],
    "index_fill": lambda t: t.index_fill_(0, torch.arange(2, device=DEVICE), 2),
    "static nonzero": lambda t: t.nonzero_static(size=3),
    "to pinned": lambda t: torch.empty(3, pin_memory=True).copy_(t, non_blocking=True),
    "CPU only": lambda t: torch.ones(3)[FLAGS].tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_seen_with_their_place(name):
    with pretend_cuda() as record:
        tensor = on_device(3)
        WAITS[name](tensor)
    assert sum(record.waits.values()) == 1
    [(_, place)] = record.waits
    assert __file__ in place  # a line of the project comes before a line of a test


@pytest.mark.parametrize("name", FREE)
def test_what_waits_for_nothing_passes(name):
    with pretend_cuda() as record:
        FREE[name](on_device(3))
    assert not record.waits


@pytest.mark.parametrize(
    "mix",
    [
        lambda t: t + torch.ones(3),
        lambda t: torch.ones(3) @ t,
        lambda t: torch.cat([t, torch.ones(3)]),
        lambda t: torch.ones(3)[t.long()],
        lambda t: t.__setitem__(torch.arange(2, device=DEVICE), torch.ones(2)),
        lambda t: torch.nn.Linear(3, 2)(t),
        lambda t: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    ],
)
def test_mixed_devices_are_refused(mix):
    with pretend_cuda(), pytest.raises(MixedDevices):
        mix(on_device(3))


def test_numpy_wants_a_tensor_of_the_cpu():
    with pretend_cuda():
        with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
            on_device(3).numpy()
        assert on_device(3).cpu().numpy().sum() == 3


def test_values_and_gradients_are_the_cpus_and_stay_there():
    def losses(device):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(device)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        images = torch.randn(5, 3).to(device)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = network(images).square().mean() + network[0].weight.sum()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        assert all(is_on_device(p.grad) == (device is DEVICE) for p in network.parameters())
        assert all(is_on_device(t) == (device is DEVICE) for t in network.state_dict().values())
        return torch.stack(found).cpu()

    with pretend_cuda():
        pretended = losses(DEVICE)
    assert torch.equal(pretended, losses(torch.device("cpu")))


def test_outside_the_block_nothing_is_left():
    before = torch.cuda.is_available(), torch.autocast, torch.cuda.Event
    with pretend_cuda():
        assert torch.cuda.is_available() and on_device(2).is_cuda
        assert on_device(2).device == DEVICE and not torch.ones(2).is_cuda
    assert (torch.cuda.is_available(), torch.autocast, torch.cuda.Event) == before
    assert not torch.ones(2).is_cuda
