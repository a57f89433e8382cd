from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own: one that has allocated before may serve the block from what its
# allocator kept resident, and the peak would rightly not rise.
_MEASURE = """
import json
import torch
from moco.evaluation.memory import peak_memory, peak_rss_bytes, reset_peak_rss

reset_peak_rss()
before = peak_rss_bytes()
block = torch.ones(256 << 20, dtype=torch.uint8)
del block
peak = peak_rss_bytes()
figures = peak_memory(torch.device("cpu"))
reset_peak_rss()
print(json.dumps([before, peak, figures, peak_rss_bytes()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reset works on Linux only")
def test_the_peak_is_of_what_was_held_since_the_reset():
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak, figures, after_reset = json.loads(done.stdout)
    assert 240 << 20 < peak - before < 272 << 20
    assert figures == {"peak_rss_bytes": peak, "peak_gpu_bytes": None}
    assert after_reset < peak - (200 << 20)
