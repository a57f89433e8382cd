"""Run a study: pretraining runs that differ in named keys, and one table of their results.

python tools/study.py --study configs/studies/temperature.yaml --data DIR --output-dir OUT \\
    [--seeds 0 1] [--config-file FILE] [--linear FILE] [--detection FILE --trials 5] \\
    [--parallel N | --index I | --list | --table] [KEY VALUE ...]

The same command continues a study that was stopped. --index runs one of the runs that --list
numbers, for a job array (`--index $SLURM_ARRAY_TASK_ID`); --table only writes the table of what is
there. --cost --batches 64 128 trains nothing and measures seconds and memory of a step of each row
(costs.md, costs.json). KEY VALUE pairs hold for all runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from moco.data.images import find_images  # noqa: E402
from moco.errors import ConfigError, exit_on_error  # noqa: E402
from moco.signals import exit_on_signals  # noqa: E402
from moco.slots import slot_environments  # noqa: E402
from moco.studies import table  # noqa: E402
from moco.studies.plan import PlannedRun, Study, load_study, plan_runs  # noqa: E402
from moco.studies.run import Runner, Stage, read_pretraining  # noqa: E402
from moco.training.checkpoint import read_json, write_json_atomic, write_text_atomic  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", required=True, metavar="FILE", help="YAML of configs/studies")
    parser.add_argument("--data", required=True, help="folder of images, as for tools/pretrain.py")
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--config-file", metavar="FILE", help="start all runs from it instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--linear", metavar="FILE", help="evaluate linearly too, by this YAML")
    parser.add_argument("--detection", metavar="FILE", help="fine-tune detectors too, by this YAML")
    parser.add_argument("--trials", type=int, default=5, help="of --detection")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=1, help="of each stage (torchrun)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once")
    what.add_argument("--index", type=int, metavar="I", help="only run number I of --list")
    what.add_argument("--list", action="store_true", help="number the runs, and stop")
    what.add_argument("--table", action="store_true", help="write the table, and stop")
    what.add_argument("--cost", action="store_true", help="measure what a step costs, and stop")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="of --cost")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of --cost, timed")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="of --cost; default: all")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(argv)


@exit_on_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    study = load_study(args.study, args.config_file)
    runs = plan_runs(study, args.seeds, args.opts)
    if args.list:
        for number, run in enumerate(runs):
            print(f"{number}: {run.row}, seed {run.seed}: {' '.join(run.overrides)}")
        return 0
    if args.cost:
        with exit_on_signals():
            _write_costs(args, study, runs)
        return 0
    errors: list[str] = []
    if not args.table:
        errors = _runner(args, study.config_file).run_all(_chosen(runs, args.index))
    content = table.collect(study, runs, args.output_dir)
    print(table.write(content, study.published_columns, args.output_dir))
    return 1 if errors else 0


def _write_costs(args: argparse.Namespace, study: Study, runs: list[PlannedRun]) -> None:
    from moco.studies import cost

    if not args.batches or min(args.batches) < 1 or args.steps < 1:
        raise ConfigError("--cost: give --batches, e.g. --batches 64 128, and --steps 1 or more")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    content = cost.measure_costs(
        study, runs[: len(study.rows)], sorted(args.batches),
        num_images=len(find_images(args.data)), num_steps=args.steps, device=device,
        memory_limit=args.memory_limit or memory / 2**30,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    text = cost.markdown(content)
    write_json_atomic(args.output_dir / "costs.json", content)
    write_text_atomic(args.output_dir / "costs.md", text)
    print(text)


def _chosen(runs: list[PlannedRun], index: int | None) -> list[PlannedRun]:
    if index is None:
        return runs
    if not 0 <= index < len(runs):
        raise ConfigError(f"--index {index}: allowed are 0 to {len(runs) - 1} (see --list)")
    return [runs[index]]


def _runner(args: argparse.Namespace, config_file: str) -> Runner:
    if args.parallel < 1 or args.processes < 1:
        raise ConfigError(
            f"--parallel {args.parallel} --processes {args.processes}: 1 or more are needed"
        )
    if args.parallel > 1 and args.processes > 1:
        raise ConfigError("--parallel and --processes: give one of them above 1")
    def stages(run: PlannedRun, folder: Path) -> Sequence[Stage]:
        return _stages(args, config_file, run, folder)

    return Runner(
        args.output_dir, stages, environments=_environments(args.parallel, args.device),
        say=lambda line: print(line, flush=True),
    )  # fmt: skip


def _environments(num_slots: int, device: str) -> Sequence[Mapping[str, str]]:
    """Of the commands in each slot: a GPU, or a share of the cores; for a single one all."""
    if num_slots == 1:
        return [os.environ]
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return slot_environments(num_slots, num_gpus, os.environ)


def _stages(
    args: argparse.Namespace, config_file: str, run: PlannedRun, folder: Path
) -> list[Stage]:
    pretrained = folder / "pretrain"
    command = [
        *_python(args), str(ROOT / "tools" / "pretrain.py"), "--config-file", config_file,
        "--data", args.data, "--output-dir", str(pretrained), "--device", args.device,
        "--resume", *run.overrides,
    ]  # fmt: skip
    stages = [Stage("pretrain", command, read_pretraining)]
    if args.linear:
        stages.append(_linear_stage(args, pretrained, folder / "linear"))
    if args.detection:
        stages += _detection_stages(args, pretrained, folder)
    return stages


def _python(args: argparse.Namespace) -> list[str]:
    """The beginning of a command that runs in --processes processes."""
    if args.processes == 1:
        return [sys.executable]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, "--nproc-per-node", str(args.processes)]


def _linear_stage(args: argparse.Namespace, pretrained: Path, output: Path) -> Stage:
    command = [
        *_python(args), str(ROOT / "tools" / "evaluate_linear.py"), "--config-file", args.linear,
        "--weights", str(pretrained), "--data", args.data, "--output-dir", str(output),
        "--device", args.device, "--resume",
    ]  # fmt: skip

    def read(folder: Path) -> dict:
        result = read_json(folder / "linear" / "results.json")
        return {"top1": result["top1"], "top5": result["top5"]}

    return Stage("linear", command, read)


def _detection_stages(args: argparse.Namespace, pretrained: Path, folder: Path) -> list[Stage]:
    weights = folder / "backbone.pth"
    convert = [
        sys.executable, str(ROOT / "tools" / "convert_to_d2.py"), str(pretrained), str(weights),
    ]  # fmt: skip
    # On a CPU one process with all cores; SyncBN, which most configurations have, runs in no more.
    is_on_gpu = args.device != "cpu" and torch.cuda.is_available()
    train = [
        sys.executable, str(ROOT / "detection" / "train_net.py"), "--config-file", args.detection,
        "--trials", str(args.trials), "--resume", "--device", args.device,
        "--num-gpus", str(args.processes if is_on_gpu else 1), "MODEL.WEIGHTS", str(weights),
        "OUTPUT_DIR", str(folder / "detection"),
    ]  # fmt: skip

    def read(folder: Path) -> dict:
        mean = read_json(folder / "detection" / "results.json")["mean"]
        return {name: mean[name] for name in ("AP50", "AP", "AP75")}

    return [Stage("convert", convert, lambda folder: {}), Stage("detection", train, read)]


if __name__ == "__main__":
    main()
