"""tools/pretrain.py that ends by a fault at its first start; for launchers that start it again.

python tests/pretrain_with_fault.py HOW STEP RANK MARKER [flags of tools/pretrain.py]
(HOW and STEP as in faults.Stop; the fault is armed where the file MARKER.RANK does not exist)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from faults import Stop, arm  # noqa: E402
from scripts import load_tool  # noqa: E402

if __name__ == "__main__":
    how, step, rank, marker, *flags = sys.argv[1:]
    own_rank = int(os.environ.get("RANK", "0"))
    started = Path(f"{marker}.{own_rank}")
    if not started.exists():
        started.touch()
        arm(Stop(how, int(step), int(rank)), own_rank)
    load_tool("pretrain").main(flags)
