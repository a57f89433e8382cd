"""Run the fault campaign and print its table.

python tests/reliability/print_table.py [--long] [--rows R1 R4 ...]

Prints Markdown, as docs/RELIABILITY.md has it. Exit status 1 where a test fails or a row has no
observation or no negative control.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Row -> what is injected, what must be observed.
ROWS = {
    "R1": ("kill -9 of all processes, seeded points, 8 inside checkpoint writes",
           "the same command ends in the same digest"),
    "R2": ("kill -9 of one rank under torchrun --max-restarts",
           "exit 0, the same digest, resumed in less than 30 s"),
    "R3": ("kill -9 at each point of a checkpoint's writing",
           "a verified checkpoint exists, leftovers are swept"),
    "R4": ("a flipped bit, a truncation, a missing manifest",
           "refused with file and reason, the one before taken, the same digest"),
    "R5": ("a full disk", "path, needed and free bytes named; the old checkpoint intact; "
           "checked before training"),
    "R6": ("SIGTERM to launcher or rank; in evaluation, in the first step, with workers",
           "one step on all ranks, a checkpoint, exit code 143, the same digest"),
    "R7": ("SIGSTOP of a rank", "the job ends, rank and step are named"),
    "R8": ("a skipped collective, another sample, one changed bit of a weight on one rank",
           "found, the rank named"),
    "R9": ("NaN or Inf in loss, gradient, key or queue of one rank",
           "no rank updates, one stop step, sample ids and replay file"),
    "R10": ("resumed with another number of processes or workers",
            "refused or elastic as documented, batches bit-identical"),
    "R11": ("two jobs on one output folder, a stale lock",
            "the second refuses with host and process; the stale lock is taken over"),
    "R12": ("learning rate, architecture, data or code changed between runs",
            "refused by name, or warned of; --allow-change records it"),
    "R13": ("queue, data set and last batch that do not fit the batch",
            "refused or counted before any image is read"),
    "R14": ("hostile images", "listed with path and reason, replaced alike, bounded by fraction"),
    "R15": ("a loader worker killed or hung, a small /dev/shm, a reader with EIO",
            "one clear line naming the sample; retried and counted"),
    "R16": ("wrong, swapped, incomplete checkpoints; with and without a prefix",
            "refused, or matched one to one"),
    "R17": ("configuration: typo, type, duplicate key, tag, alias bomb",
            "refused with the nearest right key"),
    "R18": ("mutated VOC annotations, entity bombs, hostile ids and splits",
            "read or named, none uncaught, no hang"),
    "R19": ("the trials' driver killed, started twice, a trial that always fails",
            "each trial once, the same mean and std, the failed one not averaged"),
    "R20": ("retention while the newest checkpoint is corrupt",
            "as many verified ones kept, the last good one never deleted"),
    "R21": ("hostile .pth, .pkl, .yaml, .tar, .xml and safetensors files",
            "refused in less than 1 s and 200 MB, no code run"),
    "R22": ("2,000 steps", "memory, files and processes flat, all released at exit"),
    "R23": ("annotations, splits or flags of a detection run changed, its folder moved",
            "refused by name, or recorded and never averaged; a moved folder is the same"),
    "R24": ("test images in the pretraining set, also re-encoded and resized; excluded; weights "
            "without a record",
            "each counted and no other; never trained on; unknown, with the reason"),
    "R25": ("a detector meets the same classes in another order, or others",
            "refused with both lists and the right order"),
    "R26": ("SIGTERM, SIGINT or kill -9 to demo, study, trials, launcher, SVMs, packing, benchmark",
            "0 processes left, training saved, exit code 143 or 130, the same command finishes"),
    "fuzz": ("seeded draws of VOC XML, weights, shard indexes, configurations (hypothesis)",
             "a valid result or one line of error"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="the nightly form")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        record, junit = Path(folder) / "record.jsonl", Path(folder) / "junit.xml"
        record.touch()
        status = run_campaign(args.rows, args.long, record, junit)
        lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        seconds = seconds_by_row(junit) if junit.exists() else Counter()
    print(table(args.rows, lines, seconds))
    lacking = lacks(args.rows, lines)
    if lacking:
        print(f"error: {', '.join(lacking)}", file=sys.stderr)
    return 1 if status or lacking else 0


def run_campaign(rows: list[str], long: bool, record: Path, junit: Path) -> int:
    """pytest on the rows' files, two at a time; its output goes to standard error."""
    files = [
        str(file)
        for row in rows
        for file in sorted(HERE.glob(f"test_{_stem(row)}_*.py"))
    ]
    if not files:
        return 1
    command = [sys.executable, "-m", "pytest", *files, "-m", "faults", "-n", "2"]
    command += ["--dist", "loadfile", "-q", "--durations=15", f"--junitxml={junit}"]
    command += ["--faults-long"] if long else []
    environment = {**os.environ, "RELIABILITY_RECORD": str(record)}
    return subprocess.run(
        command, cwd=HERE.parents[1], env=environment, stdout=sys.stderr
    ).returncode


def _stem(row: str) -> str:
    """Of a row's files: r01 for R1."""
    return row if row == "fuzz" else f"r{int(row[1:]):02d}"


def seconds_by_row(junit: Path) -> Counter:
    seconds: Counter = Counter()
    by_stem = {_stem(row): row for row in ROWS}
    for case in ElementTree.parse(junit).iter("testcase"):
        found = re.search(r"test_(r\d\d|fuzz)_", case.get("classname", ""))
        if found:
            seconds[by_stem[found[1]]] += float(case.get("time", 0))
    return seconds


def table(rows: list[str], lines: list[dict], seconds: Counter) -> str:
    """Markdown: a line a row; counts are sums over the row's tests."""
    text = ["| row | injected | must be observed | observed | controls that failed | s |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        injected, wanted = ROWS[row]
        own = [line for line in lines if line["row"] == row and not line["control"]]
        controls = [line for line in lines if line["row"] == row and line["control"]]
        count = f"{sum(x['passed'] for x in own)}/{sum(x['total'] for x in own)}"
        broken = f"{sum(x['passed'] for x in controls)}/{sum(x['total'] for x in controls)}"
        text.append(
            f"| {row} | {injected} | {wanted} | {count} | {broken} | {seconds[row]:.0f} |"
        )
    text.append(f"| all | | | | | {sum(seconds[row] for row in rows):.0f} |")
    return "\n".join(text)


def lacks(rows: list[str], lines: list[dict]) -> list[str]:
    """What is missing: rows without an observation, or without a control."""
    found = Counter((line["row"], line["control"]) for line in lines)
    missing = [f"{row} has no observation" for row in rows if not found[row, False]]
    return missing + [f"{row} has no negative control" for row in rows if not found[row, True]]


if __name__ == "__main__":
    sys.exit(main())
