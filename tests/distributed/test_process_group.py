"""Starting on one and several nodes, and what is said when a rank is missing, gone or stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from processes import SERVER, in_processes
from scripts import ROOT, load_tool

from moco import distributed, process_group
from moco.distributed import ProcessInfo
from moco.errors import DistributedError
from moco.lost_rank import lost_rank_as_error

CONFIG = str(ROOT / "configs/pretrain/moco_v2_200ep.yaml")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def arguments(images, folder, *flags, **changes):
    return ["--config-file", CONFIG, "--data", str(images / "train"), "--output-dir", str(folder),
            "--device", "cpu", *flags, *tiny.overrides(KNN__PERIOD=0, **changes)]  # fmt: skip


def digest_of(output: str) -> str:
    """Of the weights and the queue that all ranks ended with."""
    return re.search(r"all 2 processes hold the same .*\(sha256 ([0-9a-f]{16})\)", output)[1]


class Ranks:
    """The pretraining command in two processes of this machine, one log file each."""

    def __init__(self, words, folder):
        folder.mkdir(exist_ok=True)
        port = distributed._free_port()
        self.logs = [folder / f"log.{rank}" for rank in range(2)]
        self.processes = [
            SERVER.Process(target=_pretrain, args=(words, str(self.logs[rank]), rank, port))
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, text: str, file) -> None:
        deadline = time.monotonic() + 120
        while not (file.exists() and text in file.read_text()):
            assert time.monotonic() < deadline and self.processes[0].is_alive(), self.output(0)
            time.sleep(0.02)

    def join(self) -> list[int]:
        for process in self.processes:
            process.join(120)
            if process.exitcode is None:
                process.kill()
                raise AssertionError(f"a process did not end: {self.output(0)} {self.output(1)}")
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text()


def _pretrain(words, log, rank, port):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    load_tool("pretrain").main(words)


# Several nodes.


def test_two_nodes_of_one_process_end_as_one_node_of_two(image_folder, tmp_path):
    port = distributed._free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
              "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test",
              "--rdzv-endpoint", f"127.0.0.1:{port}", str(ROOT / "tools/pretrain.py")]  # fmt: skip
    words = arguments(image_folder, tmp_path / "nodes", TRAIN__EPOCHS=1)
    nodes = [
        subprocess.Popen(
            [*launch, *words], env=ENV, cwd="/", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    one_node, other = (
        Ranks(arguments(image_folder, tmp_path / name, TRAIN__EPOCHS=1, SEED=seed), tmp_path / name)
        for name, seed in (("one_node", 0), ("other_seed", 1))
    )
    assert one_node.join() == other.join() == [0, 0]
    printed = [output for output in outputs if "all 2 processes" in output]
    assert len(printed) == 1  # rank 0 speaks for all
    assert digest_of(printed[0]) == digest_of(one_node.output(0))
    assert digest_of(printed[0]) != digest_of(other.output(0))  # negative control


@pytest.fixture
def variables(monkeypatch):
    """Environment of rank 5 of 8: the second process of the third node."""

    def set_(**changes):
        values = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="29400")  # fmt: skip
        for name, value in {**values, **changes}.items():
            monkeypatch.setenv(name, value)

    return set_


def test_a_process_takes_the_gpu_of_its_local_rank(variables, monkeypatch):
    variables()
    joined, chosen = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "join_group", lambda *args: joined.append(args))
    process = distributed.setup_process("cuda", timeout_s=7)
    assert process == ProcessInfo(5, 8, 1, torch.device("cuda", 1))
    # NCCL is told the GPU, and connects at once.
    assert (joined, chosen) == ([("nccl", 5, 8, 7, torch.device("cuda", 1))], [1])
    variables(LOCAL_RANK="2")
    with pytest.raises(DistributedError, match="rank 5: local rank 2 needs 3 GPUs on this machine"):
        distributed.setup_process("cuda")


@pytest.fixture
def gpus(monkeypatch):
    """Stand-ins for CUDA; gpus(n) makes n visible and returns the list of those taken."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "join_group", lambda *args: None)

    def see(num):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
        return chosen

    return see


def test_a_task_of_srun_that_sees_one_gpu_takes_it(variables, monkeypatch, gpus):
    variables(LOCAL_RANK="3", SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES="3")
    chosen = gpus(1)
    process = distributed.setup_process("cuda")
    assert process == ProcessInfo(5, 8, 3, torch.device("cuda", 0)) and chosen == [0]
    gpus(8)  # srun without a binding: all tasks see all
    assert distributed.setup_process("cuda").device == torch.device("cuda", 3)
    # Negative controls: no task of srun, and torchrun's fourth process in a task's one GPU.
    gpus(1)
    for local_id in (None, "0"):
        if local_id is None:
            monkeypatch.delenv("SLURM_LOCALID")
        else:
            monkeypatch.setenv("SLURM_LOCALID", local_id)
        with pytest.raises(DistributedError, match="local rank 3 needs 4 GPUs"):
            distributed.setup_process("cuda")


def test_srun_alone_starts_the_ranks_where_a_meeting_place_is_named(monkeypatch, gpus):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("PROCID", 5), ("STEP_NUM_TASKS", 8), ("LOCALID", 1)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    gpus(1)
    # An interactive shell has these variables too, and nobody to meet.
    assert not process_group.is_rank() and distributed.setup_process("cpu").world_size == 1
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert process_group.is_rank()
    assert distributed.setup_process("cuda") == ProcessInfo(5, 8, 1, torch.device("cuda", 0))
    monkeypatch.setenv("RANK", "0")  # torchrun in a task: its variables count
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert distributed.setup_process("cuda") == ProcessInfo(0, 2, 0, torch.device("cuda", 0))


def test_a_missing_variable_and_a_timeout_of_zero_are_refused(variables, monkeypatch):
    variables(LOCAL_RANK="one")
    with pytest.raises(DistributedError, match="LOCAL_RANK is 'one' while WORLD_SIZE is set"):
        distributed.setup_process("cpu")
    with pytest.raises(DistributedError, match="collective timeout is 0; allowed: seconds above 0"):
        distributed.setup_process("cpu", timeout_s=0)
    variables()
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(DistributedError, match="rank 5 of 8: no process group .* MASTER_ADDR"):
        distributed.setup_process("cpu")


def _start(rank, num, present, port, queue):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num), LOCAL_RANK="0",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    process_group._MIN_START_SECONDS = 3.0
    try:
        distributed.setup_process("cpu", timeout_s=1)
        queue.put("joined")
    except DistributedError as error:
        queue.put(str(error))


def test_ranks_that_do_not_start_are_told_in_one_line():
    queue, port = SERVER.Queue(), distributed._free_port()
    alone = SERVER.Process(target=_start, args=(0, 2, 1, port, queue))
    alone.start()
    message = queue.get(timeout=60)
    alone.join(60)
    assert message.startswith(f"rank 0 of 2: no process group at 127.0.0.1:{port}"), message
    assert "1/2 clients joined" in message and "\n" not in message


# A rank that is lost.


@pytest.mark.parametrize("signum, state", [(signal.SIGKILL, "gone"), (signal.SIGSTOP, "stopped")])
def test_a_lost_rank_ends_the_job_with_one_line_that_names_it(
    image_folder, tmp_path, signum, state
):
    words = arguments(image_folder, tmp_path / "run", "--collective-timeout", "4",
                      TRAIN__EPOCHS=1000, CHECKPOINT__PERIOD=1000)  # fmt: skip
    ranks = Ranks(words, tmp_path / "logs")
    ranks.wait_for('"step": 5,', tmp_path / "run" / "log.jsonl")
    pid = ranks.processes[1].pid
    os.kill(pid, signum)
    codes = ranks.join()
    # The stopped process was told to go on, found its connections closed and ended by itself.
    assert codes == [2, -signal.SIGKILL if signum == signal.SIGKILL else 2]
    errors = [line for line in ranks.output(0).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in ranks.output(0)
    pattern = rf"error: step \d+: rank 0 lost contact with rank 1 \(process {pid} is {state}\); "
    assert re.match(pattern, errors[0]), errors[0]
    if signum == signal.SIGSTOP:
        assert "lost contact with rank 0" in ranks.output(1)


def _other_errors(rank):
    """An error that is no collective's stays what it is; a collective's names no healthy rank."""
    found = []
    for error in (RuntimeError("out of memory"), torch.distributed.DistBackendError("NCCL error")):
        try:
            with lost_rank_as_error(lambda: "step 3"):
                raise error
        except (RuntimeError, DistributedError) as caught:
            found.append(f"{type(caught).__name__}: {caught}")
    return found


def test_other_errors_pass_and_healthy_ranks_are_not_named(tmp_path):
    for rank, (first, second) in enumerate(in_processes(_other_errors, tmp_path)):
        assert first == "RuntimeError: out of memory"
        assert second.startswith(
            f"DistributedError: step 3: rank {rank} lost contact with another rank (none on this "
        )
        assert second.endswith("(NCCL error)")


def test_alone_nothing_is_changed():
    with pytest.raises(RuntimeError, match="gloo/"), lost_rank_as_error(lambda: "step 1"):
        raise RuntimeError("gloo/")
