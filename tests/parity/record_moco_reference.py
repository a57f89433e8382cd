"""Record the numbers of the reference's MoCo that the tests compare with everywhere.

    MOCO_REFERENCE=CHECKOUT python tests/parity/record_moco_reference.py

CHECKOUT is facebookresearch/moco at 7397dfe (its main branch is empty). Writes
golden/moco_reference.npz: 20 SGD steps in 1 and 2 processes, in float64. There another order of
sums, another CPU or another torch moves a number by 1e-13. In float32 a last bit flips a ReLU now
and then, after which 20 steps end 1e-2 apart: equality in float32 is for the live test, on one
machine with one set of kernels.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from parity.moco_sides import CASES, GOLDEN, Reference, observe, summary  # noqa: E402
from processes import in_processes  # noqa: E402


def reference_numbers(rank: int) -> dict[str, torch.Tensor]:
    """{"case/group": array} of this process."""
    return {
        f"{name}/{group}": torch.from_numpy(values)
        for name, case in CASES.items()
        for group, values in summary(observe(Reference(case, dtype=torch.float64))).items()
    }


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        for num in (1, 2):
            for rank, numbers in enumerate(in_processes(reference_numbers, folder, num=num)):
                arrays.update({f"{num}/{rank}/{key}": t.numpy() for key, t in numbers.items()})
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
