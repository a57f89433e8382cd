"""The whole main job on generated data: images -> MoCo v2 -> converter -> 5 trials -> AP.

python tools/demo.py [--output-dir runs/demo]

It runs the project's own command lines, prints each, and continues where it was stopped. The
network has ResNet-50's depth at a quarter of its width, so that 2 CPU cores finish in minutes.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detection.data.shapes import make_shapes_dataset  # noqa: E402
from detection.report import confidence_interval_of_difference  # noqa: E402
from moco.errors import exit_on_error  # noqa: E402
from moco.training.checkpoint import read_json, write_text_atomic  # noqa: E402
from moco.training.progress import format_duration  # noqa: E402

NUM_TRIALS = 5
SCORES = ("AP50", "AP", "AP75")


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    output_dir = parser.parse_args(argv).output_dir
    started = time.monotonic()
    print(
        "Demo: generated shapes; ResNet-50's depth at a quarter of its width (stem 16, res2 64 "
        f"channels); everything goes to {output_dir}",
        flush=True,
    )
    data = output_dir / "shapes"
    make_shapes_dataset(data, num_train=240, num_test=80, num_unlabelled=1200, seed=0)
    steps = [
        ["tools/pretrain.py", "--config-file", "configs/demo/pretrain.yaml", "--resume",
         "--data", data / "unlabelled", "--output-dir", output_dir / "pretrain"],
        ["tools/convert_to_d2.py", output_dir / "pretrain", output_dir / "moco_d2.pth"],
        trials_command(data, output_dir / "moco_d2.pth", output_dir / "from_moco"),
        trials_command(data, "", output_dir / "from_random"),
    ]  # fmt: skip
    for step in steps:
        code = run(step)
        if code:
            print(f"demo: stopped by exit status {code} of {step[0]}", file=sys.stderr)
            return code
    results = {
        "MoCo v2 weights": read_json(output_dir / "from_moco" / "results.json"),
        "random initialisation": read_json(output_dir / "from_random" / "results.json"),
    }
    table = comparison(results)
    write_text_atomic(output_dir / "comparison.md", f"{table}\n")
    print(f"\n{table}\n")
    print(f"pictures: {output_dir / 'from_moco' / 'trial_0' / 'pictures' / 'contact_sheet.png'}")
    for name in ("from_moco", "from_random"):
        print(f"report: {output_dir / name / 'results.md'}, {output_dir / name / 'results.png'}")
    print(f"demo finished in {format_duration(time.monotonic() - started)}")
    return 0


def trials_command(data: Path, weights: Path | str, output_dir: Path) -> list:
    return [
        "detection/train_net.py", "--config-file", "configs/demo/detection.yaml",
        "--trials", str(NUM_TRIALS), "DATASETS.VOC_ROOT", data, "MODEL.WEIGHTS", weights,
        "OUTPUT_DIR", output_dir,
    ]  # fmt: skip


def run(step: list) -> int:
    """Run one command line of the project from where the demo was started; its exit status."""
    script, *arguments = map(str, step)
    print(f"\n$ python {shlex.join([script, *arguments])}", flush=True)
    arguments = [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]
    return subprocess.run([sys.executable, str(ROOT / script), *arguments]).returncode


def comparison(results: dict[str, dict]) -> str:
    """Both rows with mean ± std, and the difference with its 95 % confidence interval (Welch)."""
    lines = [f"| {NUM_TRIALS} trials each | AP50 | AP | AP75 |", "|---|---|---|---|"]
    for name, result in results.items():
        cells = [f"{result['mean'][s]:.2f} ± {result['std'][s]:.2f}" for s in SCORES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = []
    for score in SCORES:
        first, second = (
            [trial[score] for trial in result["trials"] if trial["status"] == "finished"]
            for result in results.values()
        )
        low, high = confidence_interval_of_difference(first, second)
        difference = sum(first) / len(first) - sum(second) / len(second)
        cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
    lines.append(f"| difference [95 % interval] | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
