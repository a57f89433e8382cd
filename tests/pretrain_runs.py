"""tools/pretrain.py in processes of their own, ended at a chosen point and started again."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import tiny
from faults import Stop, arm
from PIL import Image
from processes import SERVER
from scripts import ROOT, load_tool

from moco import distributed
from moco.training import checkpoint as ckpt

CONFIG = str(ROOT / "configs/pretrain/moco_v2_200ep.yaml")
LAST = "checkpoint_0002.pth.tar"


def make_images(folder: Path, num: int = 32) -> Path:
    """A flat folder of noise images of 24 pixels."""
    rng = np.random.default_rng(0)
    for i in range(num):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def arguments(images, folder, *flags: str, variant: str = "moco", **changes: object) -> list[str]:
    """Words of the tiny run of a method's variant."""
    changes = {"METHOD": variant.partition(":")[0], "KNN__PERIOD": 0, **tiny.VARIANTS[variant],
               **changes}  # fmt: skip
    return ["--config-file", CONFIG, "--data", str(images), "--output-dir", str(folder),
            "--device", "cpu", *flags, *tiny.overrides(**changes)]  # fmt: skip


def pretrain(words: list[str], log: Path, num: int = 1, stop: Stop | None = None,
             timeout_s: float = 120) -> list[int]:  # fmt: skip
    """Run the command in `num` processes; exit codes by rank, -9 for a killed one.

    Once one has ended badly the others are given 20 s, as a launcher would. What they print goes
    to LOG.rank.
    """
    port = str(distributed._free_port())
    processes = [
        SERVER.Process(target=_rank, args=(words, f"{log}.{rank}", rank, num, port, stop))
        for rank in range(num)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        timeout_s = 20 if process.exitcode else timeout_s
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"a process did not end; see {log}.*")
    return [process.exitcode for process in processes]


def _rank(words, log, rank, num, port, stop) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if num > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
    if stop is not None:
        arm(stop, rank)
    try:
        load_tool("pretrain").main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def stop_and_continue(words: list[str], folder: Path, num: int, stop: Stop) -> dict:
    """Run until `stop` ends it, then again to the end.

    Returns: ended (exit codes), left (names in the run folder), from_step, digest, names.
    """
    ended = pretrain(words, folder.with_name(f"{folder.name}.stopped"), num, stop)
    left = sorted(os.listdir(folder))
    log = folder.with_name(f"{folder.name}.continued")
    codes = pretrain(words, log, num)
    said = Path(f"{log}.0").read_text()
    assert codes == [0] * num, said
    found = re.search(r"continuing from .* at step (\d+)/", said)
    assert found or "starting afresh" in said, said
    return {
        "ended": ended, "left": left, "from_step": int(found.group(1)) if found else 0,
        "digest": final_digest(folder), "names": sorted(os.listdir(folder)),
    }  # fmt: skip


def final_digest(folder: Path) -> str:
    return tiny.state_digest(ckpt.read_torch_file(Path(folder) / LAST))
