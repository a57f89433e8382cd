"""Print the parity table: this project's training steps against the reference's, in float32.

    MOCO_REFERENCE=CHECKOUT python tests/parity/print_moco_parity.py [--large]

CHECKOUT is facebookresearch/moco at 7397dfe. A row holds the largest difference over all steps,
tensors and processes. With --large also ResNet-50 at full width, torchvision's there (minutes).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from parity.moco_sides import (  # noqa: E402
    CASES,
    LARGE_CASES,
    NUM_STEPS,
    Ours,
    Reference,
    differences,
    observe,
)
from processes import in_processes  # noqa: E402

BUFFERS = "batch-norm buffers"


def compare(rank: int, names: list[str], broadcast_buffers: bool) -> dict:
    """case -> group -> (largest difference, bitwise)."""
    cases = {**CASES, **LARGE_CASES}
    return {
        name: differences(
            observe(Ours(cases[name])), observe(Reference(cases[name], broadcast_buffers))
        )
        for name in names
    }


def print_rows(name: str, num: int, ranks: list[dict], groups: list[str], note: str = "") -> None:
    for group in groups:
        found = [rank[name][group] for rank in ranks]
        largest = max(difference for difference, _ in found)
        bitwise = "bitwise" if all(equal for _, equal in found) else "no"
        print(f"| {name} | {group}{note} | {num} | {NUM_STEPS} | {largest:.1e} | {bitwise} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true")
    names = [*CASES, *(LARGE_CASES if parser.parse_args().large else ())]
    print("| case | quantity | processes | steps | largest difference | equality |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for num in (1, 2):
            ranks = in_processes(compare, folder, names, True, num=num)
            local = in_processes(compare, folder, names, False, num=num) if num > 1 else []
            for name in names:
                groups = list(ranks[0][name])
                buffers = [group for group in groups if group.endswith(BUFFERS)]
                print_rows(name, num, ranks, [g for g in groups if g not in buffers])
                print_rows(name, num, ranks[:1], buffers, " of rank 0" if num > 1 else "")
                print_rows(name, num, ranks[1:], buffers if num > 1 else [], " of rank 1 (1)")
                print_rows(name, num, local, buffers if num > 1 else [], " of both ranks (2)")
    print(
        "\n(1) There, DistributedDataParallel copies rank 0's buffers to all ranks before each "
        "forward; here a\n    rank keeps its own. Only rank 0's are saved, and training reads "
        "none.\n(2) The reference's model with broadcast_buffers=False."
    )


if __name__ == "__main__":
    main()
