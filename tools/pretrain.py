"""Pretrain an encoder on images without labels.

python tools/pretrain.py --config-file configs/pretrain/moco_v2_200ep.yaml \\
    --data DIR --output-dir RUN [--exclude VOC_ROOT:SPLIT] [--resume] [KEY VALUE ...]
torchrun --nproc-per-node 8 tools/pretrain.py ...          (the same flags)
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moco import distributed  # noqa: E402
from moco.cfgnode import dump_yaml  # noqa: E402
from moco.config import load_pretrain_config  # noqa: E402
from moco.data import exclude  # noqa: E402
from moco.data.images import find_images, left_out_in_words  # noqa: E402
from moco.data.rgb import Decoding  # noqa: E402
from moco.data.sixteen_bit import look_at_sixteen_bits  # noqa: E402
from moco.devices import CHOICES, memory_of  # noqa: E402
from moco.errors import exit_on_error  # noqa: E402
from moco.evaluation.monitor import build_knn_monitor  # noqa: E402
from moco.lost_rank import lost_rank_as_error  # noqa: E402
from moco.methods import build_method  # noqa: E402
from moco.process_group import leaving_group  # noqa: E402
from moco.training.acceleration import resolve  # noqa: E402
from moco.training.batch import check_batch  # noqa: E402
from moco.training.checkpoint import write_json_atomic, write_text_atomic  # noqa: E402
from moco.training.initial_weights import read_initial_weights  # noqa: E402
from moco.training.progress import ConsoleProgress, JsonLog, TensorBoardLog  # noqa: E402
from moco.training.recipe import resolve_recipe  # noqa: E402
from moco.training.run_lock import RunLock  # noqa: E402
from moco.training.trainer import Trainer  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="YAML file of configs/pretrain")
    parser.add_argument("--data", required=True, help="folder of images, or of class folders")
    parser.add_argument("--output-dir", required=True, help="run folder: checkpoints and logs")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint of the run folder; start afresh if it has none",
    )
    parser.add_argument(
        "--resume-from",
        metavar="FILE",
        help="continue from this file, ours or the reference's, in an empty run folder",
    )
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="continue with another number of processes: same batches and pixels, see docs/RESUME",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="let this configuration key (TRAIN.LR), or the list of images (data), differ from "
        "what the run was started with; recorded in its log and manifests; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="IMAGES",
        help="leave these images out, found by their content: VOC_ROOT:SPLIT, FILE.json or "
        "FILE.json:FOLDER (COCO), a folder, or a text file of paths; may be repeated",
    )
    parser.add_argument(
        "--exclude-exact-only",
        action="store_true",
        help="leave out equal files only, not re-encoded and resized copies, for which every "
        "image is decoded once",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the configuration means (batch, rate, negatives, memory) and stop",
    )
    parser.add_argument("--device", default="auto", choices=CHOICES)
    parser.add_argument(
        "--collective-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="how long a process waits for another before the job ends (default: 1800); keep it "
        "above what rank 0 does alone, such as writing a checkpoint",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(argv)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_pretrain_config(args.config_file, args.opts)
    source = find_images(args.data, Decoding.of(cfg.DATA))
    process = distributed.setup_process(args.device, args.collective_timeout)
    say = (lambda line: print(line, flush=True)) if process.is_main else (lambda line: None)
    lock = RunLock(args.output_dir, say)
    with leaving_group(), ExitStack() as at_end:
        at_end.callback(lock.release)
        resolved = resolve(cfg, process.device)
        cfg = resolved.cfg
        not_images = left_out_in_words(source)
        source, left_out = _leave_out(args, source, say)
        check_batch(cfg, source, process.world_size)
        say(
            resolve_recipe(
                cfg, num_images=len(source), world_size=process.world_size,
                device_memory=memory_of(process.device),
            ).text()
        )
        say(resolved.text)
        if args.dry_run:
            if cfg.MODEL.WEIGHTS:
                with torch.device("meta"):
                    method = build_method(cfg, len(source))
                for line in read_initial_weights(cfg, method).lines:
                    say(line)
            return 0
        output_dir = Path(args.output_dir)
        with lost_rank_as_error(lambda: "before training"):
            distributed.on_main(lock.acquire)
            trainer = Trainer(
                cfg,
                source,
                output_dir,
                process,
                resume=args.resume,
                resume_from=args.resume_from,
                elastic=args.elastic,
                allow_change=args.allow_change,
                excluded=left_out.counts if left_out else (),
                say=say,
            )
        say(
            f"{len(source)} images of {source.root}{not_images}; "
            f"{process.world_size} process(es) on {process.device.type}"
        )
        evaluate, observers = build_knn_monitor(cfg, args.data, source, process, say), []
        if process.is_main:
            for line in look_at_sixteen_bits(source):
                say(line)
            output_dir.mkdir(parents=True, exist_ok=True)
            write_text_atomic(output_dir / "config.yaml", dump_yaml(cfg))
            record = output_dir / exclude.RECORD_FILE
            if left_out:
                write_json_atomic(record, dataclasses.asdict(left_out))
            else:
                record.unlink(missing_ok=True)
            observers = [
                ConsoleProgress(trainer.total_steps, trainer.first_step),
                JsonLog(output_dir / "log.jsonl", trainer.first_step, trainer.changes.new),
            ]
            if cfg.LOG.TENSORBOARD:
                observers.append(TensorBoardLog(output_dir / "tensorboard", trainer.first_step))
        try:
            return trainer.train(observers, evaluate)
        finally:
            for observer in observers:
                observer.close()


def _leave_out(args: argparse.Namespace, source, say):
    """The source without what --exclude names, and what that is; rank 0 looks for all ranks."""
    if not args.exclude:
        return source, None
    found: list[exclude.LeftOut] = []

    def look() -> None:
        found.append(
            exclude.leave_out(
                source,
                [exclude.find_excluded(what) for what in args.exclude],
                near_copies=not args.exclude_exact_only,
                known=Path(args.output_dir) / exclude.RECORD_FILE,
                say=say,
            )
        )

    with lost_rank_as_error(lambda: "before training"):
        distributed.on_main(look)
        left_out = distributed.gather_objects(found[0] if found else None)[0]
    for line in left_out.lines(len(source)):
        say(line)
    return exclude.without(source, left_out.images), left_out


if __name__ == "__main__":
    main()
