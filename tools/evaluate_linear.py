"""Linear classification on frozen features, or fine-tuning with few labels.

python tools/evaluate_linear.py --config-file configs/evaluation/imagenet_linear.yaml \\
    --weights RUN|FILE --data DIR --output-dir OUT [--resume] [KEY VALUE ...]
torchrun --nproc-per-node 8 tools/evaluate_linear.py ...          (the same flags)

WEIGHTS is a run folder of tools/pretrain.py, a checkpoint of it or of the reference, or a file with
torchvision's names. DIR holds train/CLASS/* and val/CLASS/* (or test/). Results: OUT/results.json,
OUT/results.md. With --cached-features the features are computed once, without augmentation, and
classifiers with all rates of CACHED.LRS are trained on them; their results are not comparable with
the protocol's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moco import distributed  # noqa: E402
from moco.devices import CHOICES  # noqa: E402
from moco.errors import exit_on_error  # noqa: E402
from moco.evaluation.cached import evaluate_cached  # noqa: E402
from moco.evaluation.config import load_linear_config  # noqa: E402
from moco.evaluation.linear import EvaluationStopped, evaluate_linear  # noqa: E402
from moco.evaluation.weights import read_pretrained  # noqa: E402
from moco.process_group import leaving_group  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="YAML file of configs/evaluation")
    parser.add_argument("--weights", required=True, help="run folder, checkpoint or weights file")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PREFIX",
        help="names of unknown tensors beside the network begin so: leave them out; repeatable",
    )  # fmt: skip
    parser.add_argument("--data", required=True, help="folder with train/ and val/ or test/")
    parser.add_argument("--test-data", help="folder of the test images, if it is another")
    parser.add_argument("--output-dir", required=True, help="checkpoints, log and results")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument(
        "--cached-features",
        action="store_true",
        help="sweep rates on features computed once, without augmentation",
    )
    parser.add_argument(
        "--labels-fraction", metavar="F", help="DATA.LABELS_FRACTION: 0.01 for 1 %% of the labels"
    )
    parser.add_argument("--labels-list", metavar="FILE", help="DATA.LABELS_LIST: training images")
    parser.add_argument(
        "--finetune", action="store_true", help="FINETUNE.ENABLED: train the backbone too"
    )
    parser.add_argument("--device", default="auto", choices=CHOICES)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(argv)


def overrides(args: argparse.Namespace) -> list[str]:
    """The flags that stand for keys, then KEY VALUE pairs as they are."""
    words = []
    if args.labels_fraction is not None:
        words += ["DATA.LABELS_FRACTION", args.labels_fraction]
    if args.labels_list is not None:
        words += ["DATA.LABELS_LIST", args.labels_list, "DATA.LABELS_FRACTION", "1.0"]
    if args.finetune:
        words += ["FINETUNE.ENABLED", "True"]
    return [*words, *args.opts]


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_linear_config(args.config_file, overrides(args))
    process = distributed.setup_process(args.device)
    say = (lambda line: print(line, flush=True)) if process.is_main else (lambda line: None)
    evaluate = evaluate_cached if args.cached_features else evaluate_linear
    with leaving_group():
        try:
            evaluate(
                cfg,
                read_pretrained(args.weights, drop=args.drop),
                args.data,
                args.output_dir,
                process,
                test_dir=args.test_data,
                resume=args.resume,
                say=say,
            )
        except EvaluationStopped as stop:
            say(str(stop))
            return stop.code
    return 0


if __name__ == "__main__":
    main()
