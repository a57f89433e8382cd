"""The table of docs/PERFORMANCE.md: waits for the device and mixed devices, on the pretend one.

python tests/support/print_waits.py [--lines]        (from the repository's root)
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]

from support.device_runs import all_runs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", action="store_true", help="with the lines that wait")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| run | per | waits | mixed devices |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for outcome in all_runs(Path(folder)):
            words = outcome.name, outcome.unit, f"{outcome.num_waits:g}", outcome.mixed or "0"
            print(f"| {' | '.join(words)} |", flush=True)
            if args.lines:
                for (kind, place), num in sorted(outcome.waits.items(), key=lambda one: -one[1]):
                    print(f"    {num:6.1f}  {kind}  {place}")


if __name__ == "__main__":
    main()
