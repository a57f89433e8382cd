"""Records that loader processes share."""

from __future__ import annotations

import multiprocessing
import re

import pytest

from detection.data.packed import PackedRecords

RECORDS = [
    {"image_id": n, "annotations": [{"bbox": [0.1 * n, 2.0, 3.0, 1e-9]}] * (n % 3), "x": b"\0" * n}
    for n in range(7)
]


def test_items_are_equal_and_made_anew():
    packed = PackedRecords(RECORDS)
    assert list(packed) == RECORDS and len(packed) == 7
    packed[1]["image_id"] = 99
    assert packed[1] == RECORDS[1]
    assert len(PackedRecords([])) == 0
    for index in (-1, 7):
        with pytest.raises(IndexError):
            packed[index]


def read_all(records, queue) -> None:
    def private_kilobytes() -> int:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            return sum(map(int, re.findall(r"Private_(?:Clean|Dirty):\s+(\d+)", file.read())))

    before = private_kilobytes()
    for index in range(len(records)):
        sum(map(len, records[index]["numbers"]))
    queue.put(private_kilobytes() - before)


def test_a_forked_process_copies_none_of_them():
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            file.read()
    except OSError:
        pytest.skip("no /proc/self/smaps_rollup here")
    records = [{"numbers": [[float(n + k)] for k in range(40)]} for n in range(4000)]
    fork, copied = multiprocessing.get_context("fork"), []
    for given in (PackedRecords(records), records):
        queue = fork.SimpleQueue()
        process = fork.Process(target=read_all, args=(given, queue))
        process.start()
        copied.append(queue.get())
        process.join()
    assert copied[0] < copied[1] / 4  # the second is the control: lists are copied
