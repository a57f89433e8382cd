"""Compare two sets of trials: difference of means with a confidence interval over trials.

    python tools/compare_trials.py RUN_A RUN_B [--level 0.95] [--output FILE.md|FILE.json]

RUN_A and RUN_B are OUTPUT_DIRs of train_net.py --trials, of either engine. Trials of equal seeds
are compared in pairs (paired t), others as two samples (Welch); the output says which and why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection.comparison import compare, read_run  # noqa: E402
from detection.comparison_text import comparison_text  # noqa: E402
from moco.errors import ConfigError, exit_on_error  # noqa: E402
from moco.training.checkpoint import write_json_atomic, write_text_atomic  # noqa: E402

SUFFIXES = (".md", ".json")


@exit_on_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_a", metavar="RUN_A", help="folder with results.json")
    parser.add_argument("run_b", metavar="RUN_B", help="folder with results.json")
    parser.add_argument("--level", type=float, default=0.95, help="of the interval, 0 to 1")
    parser.add_argument(
        "--output", type=Path, action="append", default=[], metavar="FILE.md|FILE.json"
    )
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"--output {path}: allowed suffixes: {', '.join(SUFFIXES)}")
    comparison = compare(read_run(args.run_a), read_run(args.run_b), args.level)
    text = comparison_text(comparison)
    print(text, end="")
    for path in args.output:
        if path.suffix == ".md":
            write_text_atomic(path, text)
        else:
            write_json_atomic(path, comparison)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
