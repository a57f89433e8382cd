"""A rank killed under torchrun: the job starts again by itself and ends in the same bits."""

import os
import subprocess
import sys

from pretrain_runs import arguments, final_digest, make_images, pretrain
from scripts import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "2", "--monitor-interval", "0.1"]  # fmt: skip
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_kill_9_of_rank_0_restarts_the_job_and_ends_in_the_same_bits(tmp_path):
    (tmp_path / "images").mkdir()
    make_images(tmp_path / "images")
    whole = arguments(tmp_path / "images", tmp_path / "whole")
    assert pretrain(whole, tmp_path / "log", 2) == [0, 0]
    words = arguments(tmp_path / "images", tmp_path / "run", "--resume", DATA__NUM_WORKERS=1)
    fault = ["kill -9", "6", "0", str(tmp_path / "started")]
    script = str(ROOT / "tests/pretrain_with_fault.py")
    done = subprocess.run(
        [*TORCHRUN, script, *fault, *words], env=ENV, cwd="/", capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting afresh") == 1  # at the first start
    assert done.stdout.count("at step 4/12") == 1  # at the second
    assert final_digest(tmp_path / "run") == final_digest(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(tmp_path / "whole"))
