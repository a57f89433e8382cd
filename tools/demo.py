"""The whole main job on generated data: images -> MoCo v2 -> converter -> 5 trials -> AP.

python tools/demo.py [--output-dir runs/demo]

It runs the project's own command lines, prints each, and continues where it was stopped. The
network has ResNet-50's depth at a quarter of its width, so that 2 CPU cores finish in minutes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detection.data.shapes import make_shapes_dataset  # noqa: E402
from detection.report import confidence_interval_of_difference  # noqa: E402
from moco.errors import MocoError, Stopped, exit_on_error  # noqa: E402
from moco.slots import Command, Job, run_jobs, slot_environments  # noqa: E402
from moco.training.checkpoint import read_json, write_text_atomic  # noqa: E402
from moco.training.progress import format_duration  # noqa: E402

SCORES = ("AP50", "AP", "AP75")
# --short checks that everything runs; its numbers mean nothing.
SHORT_PRETRAIN = ["TRAIN.EPOCHS", "1"]
SHORT_DETECTION = [
    "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.WARMUP_ITERS", "1",
    "TEST.PRECISE_BN.NUM_ITER", "2",
]  # fmt: skip


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--short", action="store_true", help="a few steps, to check that it runs")
    args = parser.parse_args(argv)
    output_dir, started = args.output_dir, time.monotonic()
    print(
        "Demo: generated shapes; ResNet-50's depth at a quarter of its width (stem 16, res2 64 "
        f"channels); everything goes to {output_dir}",
        flush=True,
    )
    data = output_dir / "shapes"
    sizes = (16, 8, 64) if args.short else (300, 80, 1000)
    make_shapes_dataset(
        data, num_train=sizes[0], num_test=sizes[1], num_unlabelled=sizes[2], seed=0
    )
    run([
        "tools/pretrain.py", "--config-file", ROOT / "configs/demo/pretrain.yaml", "--resume",
        "--data", data / "unlabelled", "--output-dir", output_dir / "pretrain",
        *(SHORT_PRETRAIN if args.short else []),
    ])  # fmt: skip
    run(["tools/convert_to_d2.py", output_dir / "pretrain", output_dir / "moco_d2.pth"])
    arms = {"from_moco": output_dir / "moco_d2.pth", "from_random": ""}
    run(*(
        [
            "detection/train_net.py", "--config-file", ROOT / "configs/demo/detection.yaml",
            "--engine", "embedded",  # the same numbers with and without Detectron2
            "--trials", 2 if args.short else 5, "DATASETS.VOC_ROOT", data,
            "MODEL.WEIGHTS", weights, "OUTPUT_DIR", output_dir / name,
            *(SHORT_DETECTION if args.short else []),
        ]
        for name, weights in arms.items()
    ))  # fmt: skip
    table = comparison(
        {
            "MoCo v2 weights": read_json(output_dir / "from_moco" / "results.json"),
            "random initialisation": read_json(output_dir / "from_random" / "results.json"),
        }
    )
    write_text_atomic(output_dir / "comparison.md", f"{table}\n")
    print(f"\n{table}\n")
    print(f"pictures: {output_dir / 'from_moco' / 'trial_0' / 'pictures' / 'contact_sheet.png'}")
    for name in arms:
        print(f"report: {output_dir / name / 'results.md'}, {output_dir / name / 'results.png'}")
    print(f"demo finished in {format_duration(time.monotonic() - started)}")
    return 0


def run(*steps: list) -> None:
    """Run command lines of the project side by side, sharing the cores; print what they print.

    Raises: MocoError where one of them fails; Stopped after a signal, once all have saved.
    """
    environments = [os.environ]
    if len(steps) > 1:  # on a CPU two processes of half the threads are faster than one after one
        environments = slot_environments(len(steps), 0, os.environ)
    codes = {}

    def job(step: list, slot: int) -> Job:
        script, *arguments = map(str, step)
        prefix = f"[{slot + 1}] " if len(steps) > 1 else ""
        print(f"\n{prefix}$ python {shlex.join([script, *arguments])}", flush=True)
        command = [sys.executable, "-W", "ignore", str(ROOT / script), *arguments]
        ended = yield Command(
            command, lambda line: print(f"{prefix}{line}", end="", flush=True), environments[slot]
        )
        codes[script] = codes.get(script) or ended.code

    stopped_by = run_jobs([partial(job, step) for step in steps], len(steps), say=_say)
    again = "start the demo again to go on from there"
    if stopped_by is not None:
        raise Stopped(f"demo: stopped by {signal.Signals(stopped_by).name}; {again}", stopped_by)
    for script, code in codes.items():
        if code:
            raise MocoError(
                f"demo: {script} ended with status {code} (its lines are above); {again}"
            )


def _say(line: str) -> None:
    print(line, flush=True)


def comparison(results: dict[str, dict]) -> str:
    """Both rows with mean ± std, and the difference with its 95 % confidence interval (Welch)."""
    lines = ["| | AP50 | AP | AP75 | trials |", "|---|---|---|---|---|"]
    for name, result in results.items():
        cells = [f"{result['mean'][s]:.2f} ± {result['std'][s]:.2f}" for s in SCORES]
        lines.append(f"| {name} | {' | '.join(cells)} | {result['num_finished']} |")
    cells = []
    for score in SCORES:
        first, second = (
            [trial[score] for trial in result["trials"] if trial["status"] == "finished"]
            for result in results.values()
        )
        low, high = confidence_interval_of_difference(first, second)
        difference = sum(first) / len(first) - sum(second) / len(second)
        cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
    lines.append(f"| difference [95 % interval] | {' | '.join(cells)} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
