"""Fine-tune and score a detector on a VOC-format data set: one run, or --trials N.

    python detection/train_net.py --config-file configs/detection/pascal_voc_R_50_C4_24k_moco.yaml
        --num-gpus 8 --trials 5 MODEL.WEIGHTS moco_d2.pth OUTPUT_DIR runs/voc

Flags are Detectron2's, plus --trials, --engine and --device. torchrun works too; it then decides
the number of processes. Exit status: 0 all finished, 1 a trial failed, 2 a wrong input (one line
says which), 143 stopped by SIGTERM with the state saved.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

# Started by its path, Python puts detection/ first on the import path: `data` would be importable.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from detection import trials
from detection.config import load_detection_config
from detection.engines.base import TrainingStopped
from detection.engines.select import CHOICES, select_engine
from moco import distributed
from moco.cfgnode import CfgNode
from moco.errors import ConfigError, exit_on_error

EXIT_FAILED_TRIAL = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune Faster R-CNN R50-C4 on VOC-format data and score it."
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="detection YAML")
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="N runs with seeds SEED, SEED + 1, ... in OUTPUT_DIR/trial_k, then their mean; "
        "finished ones are skipped, unfinished ones resumed",
    )
    parser.add_argument("--engine", choices=CHOICES, default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="auto or tcp://HOST:PORT of machine 0")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="score MODEL.WEIGHTS, a fine-tuned model's file"
    )
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change"
    )
    return parser.parse_args(argv)


def _check_args(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that contradict each other or this machine."""
    if args.trials is not None and args.trials < 1:
        raise ConfigError(f"--trials {args.trials}: at least 1 is needed; 5 is usual")
    if args.trials is not None and args.eval_only:
        raise ConfigError("--eval-only and --trials: give one of them; --eval-only scores one file")
    if args.resume and args.eval_only:
        raise ConfigError("--eval-only and --resume: give one of them; MODEL.WEIGHTS is scored")
    if args.num_gpus < 0 or args.num_machines < 1:
        raise ConfigError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: allowed are 0 or more "
            "and 1 or more"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank}: allowed is 0 to {args.num_machines - 1}"
        )
    num_seen = torch.cuda.device_count()
    if args.device != "cpu" and 0 < num_seen < args.num_gpus:
        raise ConfigError(f"--num-gpus {args.num_gpus}: torch sees {num_seen}; lower it")


def run(args: argparse.Namespace, cfg: CfgNode) -> int:
    """The work of one process; returns the exit status."""
    wants_cpu = args.num_gpus == 0 or (args.device == "auto" and cfg.MODEL.DEVICE == "cpu")
    process = distributed.setup_process("cpu" if wants_cpu else args.device)
    try:
        engine, why = select_engine(args.engine)
        job = trials.prepare(cfg, engine, why, process, eval_only=args.eval_only)
        if args.eval_only:
            trials.evaluate_only(job)
        elif args.trials is not None:
            results = trials.run_trials(job, args.trials)
            return EXIT_FAILED_TRIAL if results["num_failed"] else 0
        else:
            trials.run_single(job, resume=args.resume)
        return 0
    except TrainingStopped as stopped:
        if process.is_main:
            print(stopped, flush=True)
        return stopped.exit_code
    finally:
        distributed.shutdown()


@exit_on_error
def _worker(args: argparse.Namespace, cfg: CfgNode) -> int:
    return run(args, cfg)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    _check_args(args)
    # Read once here, so that a wrong key is one line, not one a process.
    cfg = load_detection_config(args.config_file, args.overrides)
    if "WORLD_SIZE" in os.environ:  # torchrun started this process
        return run(args, cfg)
    num_processes = max(args.num_gpus, 1)
    if num_processes * args.num_machines == 1:
        return run(args, cfg)
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        distributed.launch(
            _worker,
            num_processes,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, cfg),
        )
    except torch.multiprocessing.ProcessExitedException as error:
        # The process has said why; a negative status is the signal that ended it.
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    return 0


def _pass_on(signum, frame) -> None:
    for child in multiprocessing.active_children():
        child.terminate()


if __name__ == "__main__":
    main()
