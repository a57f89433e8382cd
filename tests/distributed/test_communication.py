"""Bytes that a training step brings to a process: counted, by the sockets, and by the formula."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from scripts import ROOT, load_tool

from moco.benchmarks import communication
from moco.benchmarks.communication import BUFFERS, GRADIENTS, IMAGES, KEYS, KINDS, VARIANTS
from moco.benchmarks.traffic import CountedTraffic
from moco.errors import ConfigError

TINY = communication.Options(
    arch="resnet18", width=0.125, image_size=32, batch=4, queue=64, steps=2
)


def _measure(rank):
    return {name: asdict(communication.measure(TINY, v)) for name, v in VARIANTS.items()}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """number of processes, and for each of them: variant -> what was measured."""
    folder = tmp_path_factory.mktemp("communication")
    return request.param, in_processes(_measure, folder, num=request.param)


@pytest.mark.parametrize("name", VARIANTS)
def test_counted_bytes_are_the_formulas(ranks, name):
    num, found = ranks
    sizes = communication.Sizes.of(TINY)
    expected = communication.expected_bytes(VARIANTS[name], num, TINY.batch, sizes)
    for rank, measured in enumerate(m[name] for m in found):
        counted = measured["counted"]
        assert list(counted) == list(KINDS)
        assert counted[IMAGES] == measured["planned_images"] > 0
        assert counted[GRADIENTS] == pytest.approx(expected[GRADIENTS])
        assert counted[BUFFERS] == (expected[BUFFERS] if rank else 0)
        assert counted["findings"] < 10
        if VARIANTS[name].gathers:
            assert (counted[IMAGES], counted[KEYS]) == (expected[IMAGES], expected[KEYS])
    # Over all ranks the draws even out: 32 or more images, (W - 1) / W of them on average.
    for kind in (IMAGES, KEYS):
        mean = sum(m[name]["counted"][kind] for m in found) / num
        assert mean == pytest.approx(expected[kind], rel=0.35)


def test_no_queue_is_broadcast_in_a_step_but_with_ddps_default_it_is(ranks):
    num, found = ranks
    last = found[-1]
    assert last["this project"]["counted"][BUFFERS] == 0
    control = last["as the reference"]["counted"][BUFFERS]
    assert control > TINY.queue * 128 * 4  # the queue, and batch-norm statistics


@pytest.mark.parametrize("name", VARIANTS)
def test_the_sockets_received_what_was_counted(ranks, name):
    for measured in (m[name] for m in ranks[1]):
        if measured["sockets"] is None:
            pytest.skip("this system does not tell the bytes of a connection")
        surplus = measured["sockets"] - sum(measured["counted"].values())
        assert -8 <= surplus < 20_000  # gloo's headers; nothing of the size of images or queue


def _by_hand(rank):
    traffic, tensor = CountedTraffic(), torch.zeros(6, 2)
    with traffic:
        dist.broadcast(tensor, src=0)
        dist.all_reduce(tensor)
        with traffic.kind("gathered"):
            dist.all_gather([torch.empty(6, 2) for _ in range(2)], tensor)
        with traffic.kind("exchanged"):
            counts = [5, 1] if rank == 0 else [1, 5]
            dist.all_to_all_single(torch.empty(6, 2), tensor, counts, counts)
        dist.barrier()
        with pytest.raises(NotImplementedError, match="c10d::reduce_"):
            dist.reduce(tensor, dst=0)
    return dict(traffic.received)


def test_what_each_collective_brings_by_hand(tmp_path):
    first, second = in_processes(_by_hand, tmp_path)
    same = {"gradients": 48.0, "gathered": 48, "exchanged": 8.0, "findings": 0}
    assert first == {**same, "buffers": 0}
    assert second == {**same, "buffers": 48}


def test_the_table_of_published_sizes():
    """Megabytes worked out apart from this code: 32 images of 3 x 224 x 224 float32, 27.97 million
    weights, 65536 keys of 128."""
    image, gradients, queue = 3 * 224 * 224 * 4, 27.97e6 * 4, 65536 * 128 * 4
    sizes = communication.Sizes.of(communication.PUBLISHED)
    assert sizes.image == image and sizes.key == 512
    assert sizes.gradients == pytest.approx(gradients, rel=1e-3)
    assert queue < sizes.buffers < queue * 1.02
    table = {}
    for num in (8, 64, 256):
        ours, theirs = (
            communication.expected_bytes(VARIANTS[name], num, 32, sizes)
            for name in ("this project", "as the reference")
        )
        table[num] = [theirs[IMAGES], ours[IMAGES], theirs[BUFFERS], ours[GRADIENTS]]
    in_mb = {num: [float(f"{value / 1e6:.3g}") for value in row] for num, row in table.items()}
    assert in_mb == {
        8: [135, 16.9, 34, 196], 64: [1210, 19.0, 34, 220], 256: [4910, 19.2, 34, 223],
    }  # fmt: skip


def test_the_command_writes_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    words = ["communication", "--processes", "2", "--arch", "resnet18", "--width", "0.125",
             "--image-size", "32", "--batch", "4", "--queue", "64", "--steps", "1",
             "--output", str(tmp_path / "found.json")]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["tools/benchmark.py", *words[:-2]])
    with pytest.raises(SystemExit) as ended:
        load_tool("benchmark").main(words)
    assert ended.value.code == 0
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["image_bytes_as_planned"] is True
    assert written["options"]["batch"] == 4
    assert [list(rank) for rank in written["received_by_rank"]["2"]] == [list(VARIANTS)] * 2
    printed = capsys.readouterr().out
    assert "| images, gathered by all (reference) | 0.0492 | 0.0492 |" in printed
    assert communication.formula_table() in printed


@pytest.mark.parametrize(
    "queue, processes, message",
    [
        (64, [1], "--processes 1; allowed: 2 or more"),
        (16, [2, 4], "MOCO.QUEUE_SIZE 16 does not hold the 32 keys"),
    ],
)
def test_wrong_options_start_nothing(queue, processes, message, tmp_path):
    options = communication.Options(queue=queue)
    with pytest.raises(ConfigError, match=message):
        communication.run(options, processes=processes, output=tmp_path / "found.json")


def test_the_published_result_is_of_this_command_and_names_no_machine():
    text = (ROOT / "benchmarks/results/communication.json").read_text()
    written = json.loads(text)
    assert written["command"].startswith("python tools/benchmark.py communication")
    assert written["image_bytes_as_planned"] is True
    assert set(written["received_by_rank"]) == {"2", "4"}
    assert "/tmp" not in text and "/work" not in text
