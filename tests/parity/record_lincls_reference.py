"""Record the numbers of the reference's linear classification that the tests compare with.

    MOCO_REFERENCE=CHECKOUT python tests/parity/record_lincls_reference.py [--table]

CHECKOUT is facebookresearch/moco at 7397dfe (its main branch is empty). Writes
golden/lincls_reference.npz: 10 steps and 5 tests of its main_lincls.py, in float64, where another
order of sums, another CPU or another torch moves a number by 1e-13. --table prints the largest
differences in float32 instead, ResNet-50 at full width included (minutes).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from parity.lincls_sides import (  # noqa: E402
    CASES,
    GOLDEN,
    LARGE_CASES,
    NUM_STEPS,
    differences,
    run_ours,
    run_reference,
)


def record() -> None:
    arrays = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            steps, initial = run_reference(case, Path(folder), torch.float64)
        arrays.update({f"{name}/steps/{group}": values for group, values in steps.items()})
        arrays.update({f"{name}/initial/{key}": t.numpy() for key, t in initial.items()})
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size // 1024} KiB")


def print_table() -> None:
    print("| case | quantity | steps | largest difference | |\n|---|---|---|---|---|")
    for name, case in {**CASES, **LARGE_CASES}.items():
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            theirs, initial = run_reference(case, Path(one))
            ours = run_ours(case, Path(other), initial)
        for group, difference in differences(ours, theirs).items():
            bitwise = "bitwise" if np.array_equal(ours[group], theirs[group]) else "no"
            print(f"| {name} | {group} | {NUM_STEPS} | {difference:.1e} | {bitwise} |")


if __name__ == "__main__":
    print_table() if "--table" in sys.argv[1:] else record()
