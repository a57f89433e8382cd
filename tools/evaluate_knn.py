"""Weighted kNN on the features of a frozen encoder.

python tools/evaluate_knn.py --weights RUN|FILE --data DIR [--output-dir OUT]
    [--k 200 20 5] [--temperature 0.1 0.07] [--features backbone|head]
torchrun --nproc-per-node 8 tools/evaluate_knn.py ...          (the same flags)

WEIGHTS is a run folder of tools/pretrain.py, a checkpoint of it or of the reference, or a file with
torchvision's names. DIR holds train/CLASS/* (the neighbours) and val/CLASS/* or test/CLASS/*. All
pairs of k and temperature are scored in one pass; the first ones give the result. Results:
OUT/results.json, OUT/results.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moco import distributed  # noqa: E402
from moco.data import workers  # noqa: E402
from moco.devices import CHOICES  # noqa: E402
from moco.errors import dead_worker_as_data_error, exit_on_error  # noqa: E402
from moco.evaluation.knn_evaluation import KnnSettings, evaluate_knn  # noqa: E402
from moco.evaluation.weights import read_pretrained  # noqa: E402
from moco.process_group import leaving_group  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="run folder, checkpoint or weights file")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PREFIX",
        help="names of unknown tensors beside the network begin so: leave them out; repeatable",
    )  # fmt: skip
    parser.add_argument("--data", required=True, help="folder with train/ and val/ or test/")
    parser.add_argument("--test-data", help="folder of the test images, if it is another")
    parser.add_argument("--output-dir", help="where results.json and results.md go")
    parser.add_argument("--k", type=int, nargs="+", default=[200], help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.1])
    parser.add_argument("--features", choices=["backbone", "head"], default="backbone")
    parser.add_argument("--size", type=int, help="pixels; default: those of the pretraining")
    parser.add_argument("--resize", type=int, help="shorter side before the central crop")
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32",
        help="of the features that are compared",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=["pil", "opencv"], default="pil",
        help="what decodes and resizes images; opencv is faster, its pixels differ by rounding",
    )  # fmt: skip
    parser.add_argument("--amp", action="store_true", help="bfloat16 in the encoder")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time")
    parser.add_argument("--num-workers", type=int, default=4, help="loader processes")
    parser.add_argument("--device", default="auto", choices=CHOICES)
    return parser.parse_args(argv)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = KnnSettings(
        ks=tuple(args.k),
        temperatures=tuple(args.temperature),
        features=args.features,
        size=args.size,
        resize=args.resize,
        dtype=args.dtype,
        amp=args.amp,
        channels_last=args.channels_last,
        backend=args.backend,
    )
    process = distributed.setup_process(args.device)
    say = (lambda line: print(line, flush=True)) if process.is_main else (lambda line: None)
    with leaving_group():
        with dead_worker_as_data_error("--num-workers", workers.doing):
            results = evaluate_knn(
                settings,
                read_pretrained(args.weights, drop=args.drop),
                args.data,
                args.output_dir,
                process,
                test_dir=args.test_data,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                say=say,
            )
        for row in results["sweep"]:
            say(f"k {row['k']:>5}  temperature {row['temperature']:<6g}  top-1 {row['top1']:.2f}")
    return 0


if __name__ == "__main__":
    main()
