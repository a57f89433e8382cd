"""The campaign's table: every row of it has tests, and a row that saw nothing is no success."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from reliability import print_table

LINES = [
    {"row": "R1", "passed": 3, "total": 3, "control": False, "test": "a"},
    {"row": "R1", "passed": 1, "total": 2, "control": False, "test": "b"},
    {"row": "R1", "passed": 1, "total": 1, "control": True, "test": "c"},
    {"row": "R2", "passed": 5, "total": 5, "control": False, "test": "d"},
]


@pytest.mark.parametrize("row", print_table.ROWS)
def test_every_row_has_tests_and_a_control(row):
    files = list(Path(print_table.HERE).glob(f"test_{print_table._stem(row)}_*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert "observed(" in text and "control=True" in text


def test_counts_are_sums_over_a_rows_tests():
    text = print_table.table(["R1", "R2"], LINES, Counter({"R1": 1.4}))
    first, second = text.splitlines()[2:4]
    assert first.endswith("| 4/5 | 1/1 | 1 |") and second.endswith("| 5/5 | 0/0 | 0 |")


def test_a_row_without_observation_or_control_is_named():
    assert print_table.lacks(["R1", "R2", "R3"], LINES) == [
        "R3 has no observation",
        "R2 has no negative control",
        "R3 has no negative control",
    ]
