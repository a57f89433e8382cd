"""What the fault campaign observed, a line a test, in the file that RELIABILITY_RECORD names."""

from __future__ import annotations

import json
import os

import pytest

RECORD = "RELIABILITY_RECORD"  # environment variable: a file to add lines to


@pytest.fixture
def observed(request):
    """observed(row, passed, total): report what a test of a row saw; `control` a broken guard."""

    def record(row: str, passed: int, total: int, *, control: bool = False) -> None:
        path = os.environ.get(RECORD)
        if path:
            line = {"row": row, "passed": passed, "total": total, "control": control,
                    "test": request.node.name}  # fmt: skip
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        assert passed == total, f"{row}: {passed} of {total}"

    return record


@pytest.fixture
def long(request) -> bool:
    return request.config.getoption("--faults-long")
