"""How far the embedded engine is from the goldens on this machine: JSON, quantity -> largest
relative difference.

    [ATEN_CPU_CAPABILITY=avx2 ...] python tests/parity/golden_differences.py

Environment variables choose another code path of the same processor; PARITY_NO_ONEDNN=1 is torch
without oneDNN.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(_ROOT), str(_ROOT / "tests")]

import torch  # noqa: E402
from parity.cases import CASES, GOLDEN_CASES  # noqa: E402
from parity.golden import compare, load, quantity  # noqa: E402
from parity.observed import Embedded, run_case  # noqa: E402


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.backends.mkldnn.enabled = not os.environ.get("PARITY_NO_ONEDNN")
    largest: dict[str, float] = {}
    for name in GOLDEN_CASES:
        case = CASES[name]
        for row in compare(run_case(lambda case=case: Embedded(case), case), load(name)):
            # A golden file has no momenta.
            if quantity(row.name) != "momentum":
                key = quantity(row.name)
                largest[key] = max(largest.get(key, 0.0), row.difference)
    print(json.dumps(largest))


if __name__ == "__main__":
    main()
