from __future__ import annotations

import sys

import pytest
import torch

from moco.evaluation.memory import peak_memory, peak_rss_bytes, reset_peak_rss


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reset works on Linux only")
def test_the_peak_is_of_what_was_held_since_the_reset():
    reset_peak_rss()
    before = peak_rss_bytes()
    del_me = torch.ones(64 << 20, dtype=torch.uint8)
    del del_me
    peak = peak_rss_bytes()
    assert 60 << 20 < peak - before < 80 << 20
    assert peak_memory(torch.device("cpu")) == {"peak_rss_bytes": peak, "peak_gpu_bytes": None}
    reset_peak_rss()
    assert peak_rss_bytes() < peak
