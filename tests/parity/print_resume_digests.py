"""Print the resume table: a run ended at each stopping point, continued, and its final digest.

    python tests/parity/print_resume_digests.py [--processes 1 2]

The run is tools/pretrain.py on a tiny network and 32 noise images: 12 steps, a checkpoint after
4, 8 and 12 of which one is kept. The digest is a SHA-256 over both encoders with their batch-norm
buffers, queue and pointer, the optimizer's state, epoch and step. "folder" is whether the run
folder ends with the same files: nothing is left of a killed writer. Exits 1 where a row differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults import STOPS, WRITE_POINTS  # noqa: E402
from pretrain_runs import (  # noqa: E402
    arguments,
    final_digest,
    make_images,
    pretrain,
    stop_and_continue,
)


def print_rows(num: int, images: Path, base: Path) -> int:
    """Returns: how many rows differ from the uninterrupted run."""
    whole = base / "whole"
    assert pretrain(arguments(images, whole), base / "whole.log", num) == [0] * num
    expected, names = final_digest(whole), sorted(os.listdir(whole))
    print_row(num, "not stopped", "", [0] * num, "", expected, "", "")
    num_different = 0
    for number, stop in enumerate(STOPS):
        folder = base / str(number)
        found = stop_and_continue(arguments(images, folder, "--resume"), folder, num, stop)
        same, clean = found["digest"] == expected, found["names"] == names
        where = ("checkpoint of step " if stop.how in WRITE_POINTS else "step ") + str(stop.step)
        if stop.how not in WRITE_POINTS:
            where += ", all ranks" if stop.rank is None else f", rank {stop.rank}"
        print_row(
            num, stop, where, found["ended"], found["from_step"], found["digest"],
            "yes" if same else "NO", "yes" if clean else "NO",
        )  # fmt: skip
        num_different += not (same and clean)
    return num_different


def print_row(num, how, where, ended, from_step, digest, same, clean) -> None:
    codes = " ".join(map(str, ended))
    short = digest.rpartition("-")[2][:12]
    print(f"| {num} | {how} | {where} | {codes} | {from_step} | {short} | {same} | {clean} |",
          flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    numbers = parser.parse_args().processes
    print("| processes | how it ended | where | exit codes | continued from | digest | equal | "
          "folder |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        make_images(images)
        different = 0
        for num in numbers:
            base = Path(folder) / str(num)
            base.mkdir()
            different += print_rows(num, images, base)
    print(f"\n{len(STOPS) * len(numbers)} stops, {different} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
