"""Fine-tune and score a detector on a VOC-format data set: one run, or --trials N.

    python detection/train_net.py --config-file configs/detection/pascal_voc_R_50_C4_24k_moco.yaml
        --num-gpus 8 --trials 5 MODEL.WEIGHTS moco_d2.pth OUTPUT_DIR runs/voc

Flags are Detectron2's, plus --trials, --trials-parallel, --engine and --device. torchrun works
too; it then decides the number of processes. Exit status: 0 all finished, 1 a trial failed, 2 a
wrong input (one line says which), 143 or 130 stopped by SIGTERM or Ctrl-C with the state saved.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

# Started by its path, Python puts detection/ first on the import path: `data` would be importable.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from detection import parallel_trials, trials
from detection.config import check_processes, load_detection_config
from detection.engines.base import TrainingStopped
from detection.engines.select import CHOICES, select_engine
from detection.run_identity import check_allowed_changes
from moco import distributed
from moco.cfgnode import CfgNode
from moco.distributed import ProcessInfo
from moco.errors import ConfigError, exit_on_error
from moco.process_group import is_rank, leaving_group
from moco.training.run_lock import RunLock

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
    parser.add_argument(
        "--trials-parallel",
        action="store_true",
        help="run --num-gpus trials side by side, each on one GPU (with --device cpu: in one "
        "process), instead of one after the other on all of them",
    )
    parser.add_argument("--only-trial", type=int, help=argparse.SUPPRESS)  # by --trials-parallel
    parser.add_argument(
        "--engine",
        choices=CHOICES,
        default="auto",
        help="auto: Detectron2 where it works and implements the settings, else the embedded one",
    )
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
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="let this configuration key (SOLVER.MAX_ITER), or the images and annotations (data), "
        "differ from what the run was started with; recorded in its checkpoints and results; may "
        "be repeated",
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
    check_allowed_changes(args.allow_change)
    if args.allow_change and args.eval_only:
        raise ConfigError("--eval-only and --allow-change: give one of them; no run is continued")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank}: allowed is 0 to {args.num_machines - 1}"
        )
    if args.trials_parallel:
        _check_parallel(args)
    num_seen = torch.cuda.device_count()
    if args.device != "cpu" and 0 < num_seen < args.num_gpus:
        raise ConfigError(f"--num-gpus {args.num_gpus}: torch sees {num_seen}; lower it")


def _check_parallel(args: argparse.Namespace) -> None:
    if args.trials is None:
        raise ConfigError("--trials-parallel: needs --trials N, the number of trials")
    if args.num_machines > 1 or is_rank():
        raise ConfigError(
            "--trials-parallel: runs on one machine and starts its processes itself; leave out "
            "--num-machines and torchrun"
        )
    if args.num_gpus < 2:
        raise ConfigError(
            f"--trials-parallel: with --num-gpus {args.num_gpus} one trial runs at a time; give "
            "--num-gpus P, the number of trials side by side (with --device cpu: of processes)"
        )


def _device(args: argparse.Namespace, cfg: CfgNode) -> str:
    """What `setup_process` is asked for: auto, cpu or cuda."""
    wants_cpu = args.num_gpus == 0 or (args.device == "auto" and cfg.MODEL.DEVICE == "cpu")
    return "cpu" if wants_cpu else args.device


def run(args: argparse.Namespace, cfg: CfgNode) -> int:
    """The work of one process; returns the exit status."""
    device = _device(args, cfg)
    set_up = parallel_trials.parent_process if args.trials_parallel else distributed.setup_process
    process = set_up(device)
    lock = RunLock(_locked_folder(args, cfg), setting="OUTPUT_DIR")
    with leaving_group(), ExitStack() as at_end:
        at_end.callback(lock.release)
        if process.is_main and not args.eval_only:
            lock.acquire()
        try:
            return _train_or_score(args, cfg, process, device)
        except TrainingStopped as stopped:
            if process.is_main:
                print(stopped, flush=True)
            return stopped.exit_code


def _train_or_score(
    args: argparse.Namespace, cfg: CfgNode, process: ProcessInfo, device: str
) -> int:
    """What the flags ask for; returns the exit status. Raises: TrainingStopped."""
    engine, why = select_engine(args.engine, cfg, process.device.type)
    job = trials.prepare(
        cfg, engine, why, process, eval_only=args.eval_only, allow_change=args.allow_change
    )
    if args.eval_only:
        trials.evaluate_only(job)
        return 0
    if args.only_trial is not None:
        result = trials.run_only_trial(job, args.only_trial)
        return 0 if result["status"] == "finished" else EXIT_FAILED_TRIAL
    if args.trials is None:
        trials.run_single(job, resume=args.resume)
        return 0
    if args.trials_parallel:
        command = partial(_command_of_trial, args, engine.name, device)
        results = parallel_trials.run_trials_side_by_side(job, args.trials, command, args.num_gpus)
    else:
        results = trials.run_trials(job, args.trials)
    return EXIT_FAILED_TRIAL if results["num_failed"] else 0


def _locked_folder(args: argparse.Namespace, cfg: CfgNode) -> Path:
    """What one job at a time may write to; a process of --trials-parallel has its trial's own."""
    folder = Path(cfg.OUTPUT_DIR).expanduser()
    return folder if args.only_trial is None else folder / f"trial_{args.only_trial}"


def _command_of_trial(args: argparse.Namespace, engine: str, device: str, k: int) -> list[str]:
    """The command line of the process of trial k under --trials-parallel."""
    command = [sys.executable, str(Path(__file__).resolve()), "--config-file", args.config_file]
    command += ["--only-trial", str(k), "--engine", engine, "--device", device]
    for name in args.allow_change:
        command += ["--allow-change", name]
    return [*command, *args.overrides]


@exit_on_error
def _worker(args: argparse.Namespace, cfg: CfgNode) -> int:
    return run(args, cfg)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    _check_args(args)
    # Read and checked once here, so that a wrong key is one line, not one a process.
    cfg = load_detection_config(args.config_file, args.overrides)
    if is_rank():  # torchrun or srun started this process
        return run(args, cfg)
    num_processes = max(args.num_gpus, 1)
    if num_processes * args.num_machines == 1 or args.trials_parallel:
        return run(args, cfg)
    if not args.eval_only:
        is_cpu = _device(args, cfg) == "cpu" or not torch.cuda.is_available()
        check_processes(cfg, num_processes * args.num_machines, "cpu" if is_cpu else "cuda")
    return distributed.launch(
        _worker,
        num_processes,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args, cfg),
    )


if __name__ == "__main__":
    main()
