"""Classification of VOC images by linear SVMs on frozen features (VOC07 as others report it).

python tools/evaluate_svm.py --weights RUN|FILE --voc-root VOCdevkit/VOC2007 --output-dir OUT
    [--train-split trainval] [--test-split test] [--classes NAME ...]

WEIGHTS is a run folder of tools/pretrain.py, a checkpoint of it or of the reference, or a file with
torchvision's names. Labels are read from the folder's annotations: an image counts for a class that
it shows, and is left out of the test of a class of which it shows difficult objects only. Results:
OUT/results.json, OUT/results.md. Needs scikit-learn (pip install '.[probes]').
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from detection.data.data_check import raise_for_problems  # noqa: E402
from detection.data.voc import VOC_CLASSES, DatasetSpec, load_records  # noqa: E402
from moco import distributed  # noqa: E402
from moco.data import workers  # noqa: E402
from moco.data.images import ImageSource  # noqa: E402
from moco.errors import dead_worker_as_data_error, exit_on_error  # noqa: E402
from moco.evaluation.svm import COSTS, require_scikit_learn  # noqa: E402
from moco.evaluation.svm_evaluation import SvmSettings, evaluate_svm  # noqa: E402
from moco.evaluation.weights import read_pretrained  # noqa: E402
from moco.signals import exit_on_signals  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="run folder, checkpoint or weights file")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PREFIX",
        help="names of unknown tensors beside the network begin so: leave them out; repeatable",
    )  # fmt: skip
    parser.add_argument("--voc-root", required=True, help="folder with Annotations, JPEGImages ...")
    parser.add_argument("--train-split", default="trainval")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--classes", nargs="+", default=list(VOC_CLASSES), metavar="NAME")
    parser.add_argument("--output-dir", help="where results.json and results.md go")
    parser.add_argument("--costs", type=float, nargs="+", default=list(COSTS), metavar="C")
    parser.add_argument(
        "--grid", type=int, default=2, help="features are a grid x grid of the last feature map"
    )
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the SVM solver")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time")
    parser.add_argument("--num-workers", type=int, default=4, help="loader processes")
    parser.add_argument("--num-jobs", type=int, default=os.cpu_count(), help="SVMs at a time")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser.parse_args(argv)


def read_split(root: str, split: str, classes: tuple[str, ...]) -> tuple[ImageSource, np.ndarray]:
    """Images of a VOC split, and labels [N, C]: 1 shown, 0 not, -1 difficult objects only.

    Raises: DataError that lists what is wrong with the folder.
    """
    name = f"{Path(root).resolve().name}_{split}"
    records, report = load_records(DatasetSpec(name, root, split, classes, 2007))
    raise_for_problems(report)
    labels = np.zeros((len(records), len(classes)), dtype=np.int8)
    for row, record in zip(labels, records, strict=True):
        for annotation in record["annotations"]:
            shown = -1 if annotation["difficult"] else 1
            class_id = annotation["category_id"]
            row[class_id] = shown if row[class_id] != 1 else 1
    folder = Path(root) / "JPEGImages"
    paths = tuple(Path(record["file_name"]).relative_to(folder).as_posix() for record in records)
    return ImageSource(str(folder), paths, None, ()), labels


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    require_scikit_learn()
    root, classes = os.path.expanduser(args.voc_root), tuple(args.classes)
    settings = SvmSettings(tuple(args.costs), args.grid, args.size, args.seed)
    train, test = (read_split(root, s, classes) for s in (args.train_split, args.test_split))
    process = distributed.setup_process(args.device)
    with exit_on_signals(), dead_worker_as_data_error("--num-workers", workers.doing):
        evaluate_svm(
            settings,
            read_pretrained(args.weights, drop=args.drop),
            train,
            test,
            classes,
            args.output_dir,
            process,
            dataset=f"{Path(root).resolve().name} ({args.train_split}, {args.test_split})",
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            num_jobs=args.num_jobs,
            say=lambda line: print(line, flush=True),
        )
    return 0


if __name__ == "__main__":
    main()
