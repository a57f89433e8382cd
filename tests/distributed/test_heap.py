"""What set-up asks of the C library's heap: freed memory is kept, and is of huge pages."""

import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import sys
from pathlib import Path
import torch
from moco import distributed

def huge_mib():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("AnonHugePages:")[1].split()[0]) // 1024

if sys.argv[1] == "set up":
    distributed.setup_process("cpu")
before = huge_mib()
tensor = torch.ones(64 << 18)  # 64 MiB
print(huge_mib() - before)
"""


def run(how):
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(
    not (SETTING.is_file() and "[madvise]" in SETTING.read_text()),
    reason="this system does not leave huge pages to programs",
)
def test_memory_is_of_huge_pages_where_the_system_leaves_that_to_programs():
    assert run("set up") >= 32
    assert run("not") == 0  # negative control
