"""configs/slurm/pretrain.sbatch, run by bash with stand-ins for SLURM's commands and torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from scripts import ROOT, load_tool
from torch.distributed.run import parse_args

from moco.config import load_pretrain_config

SCRIPT = ROOT / "configs/slurm/pretrain.sbatch"
STAND_INS = {
    # `kill -TERM` reaches torchrun through srun, which passes signals on.
    "srun": 'exec "$@"',
    # A reader that takes one line and goes would end it by SIGPIPE.
    "scontrol": 'echo "$*" >> "$LOG.scontrol"\n'
    'if [ "$1" = show ]; then echo node7; sleep 0.1; echo node8; fi',
    "torchrun": 'trap "sleep 0.2; echo saved >> $LOG.saved; exit 1" TERM\n'
    'printf "%s\\n" "$@" > "$LOG.torchrun.new"; mv "$LOG.torchrun.new" "$LOG.torchrun"\n'
    'for i in $(seq "$ROUNDS"); do sleep 0.05; done; exit "$CODE"',
}


@pytest.fixture
def start(tmp_path):
    """Starts the script; what torchrun and scontrol were given lands beside tmp_path/log."""
    for name, body in STAND_INS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def start_(rounds=0, code=0, **changes):
        variables = dict(
            PATH=f"{tmp_path}:{os.environ['PATH']}", LOG=f"{tmp_path}/log", DATA="/data/train",
            ROUNDS=str(rounds), CODE=str(code),
            RUN="runs/x", SLURM_JOB_ID="1234567", SLURM_JOB_NODELIST="node[7-8]",
            SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8",
        )  # fmt: skip
        environment = {k: v for k, v in {**variables, **changes}.items() if v is not None}
        return subprocess.Popen(
            ["bash", str(SCRIPT)], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start_


def test_the_flags_are_torchruns_and_pretrains_own(start, tmp_path):
    process = start()
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 0
    words = (tmp_path / "log.torchrun").read_text().splitlines()
    launch = parse_args(words)  # exits on a flag it does not know
    assert (launch.nnodes, launch.nproc_per_node, launch.max_restarts) == ("2", "8", 3)
    assert (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", "node7:34567")
    assert (ROOT / launch.training_script).is_file()
    args = load_tool("pretrain").parse_args(launch.training_script_args)
    assert (args.data, args.output_dir, args.resume) == ("/data/train", "runs/x", True)
    cfg = load_pretrain_config(str(ROOT / args.config_file), args.opts)
    assert cfg.TRAIN.BATCH_SIZE == 4 * 8 * 32 and cfg.TRAIN.LR == 0.03 * 1024 / 256
    assert "requeue" not in (tmp_path / "log.scontrol").read_text()


def test_the_warning_before_the_time_limit_saves_and_queues_the_job_again(start, tmp_path):
    process = start(rounds=1000)
    while not (tmp_path / "log.torchrun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "log.saved").read_text() == "saved\n"  # waited for, then queued
    assert (tmp_path / "log.scontrol").read_text().splitlines()[-1] == "requeue 1234567"


def test_a_failure_is_the_jobs_and_queues_nothing(start, tmp_path):
    assert start(code=3).wait(60) == 3
    assert "requeue" not in (tmp_path / "log.scontrol").read_text()


@pytest.mark.parametrize("name, words", [("DATA", "the folder of images"), ("RUN", "run folder")])
def test_a_missing_variable_is_said_before_anything_is_started(start, tmp_path, name, words):
    process = start(**{name: None})
    assert words in process.communicate(timeout=60)[0] and process.returncode == 1
    assert not (tmp_path / "log.torchrun").exists()


def test_bash_reads_the_script():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
