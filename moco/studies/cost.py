"""What a step of each mechanism costs at equal batches: seconds, memory, where memory ends.

Every measurement runs in a process of its own, on random images, with the method, optimizer and
step that training uses.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from moco import distributed
from moco.child_processes import end_with_parent, running
from moco.config import load_pretrain_config
from moco.errors import ConfigError
from moco.methods import build_method
from moco.seeding import derive_seed
from moco.studies.plan import PlannedRun, Row, Study
from moco.training.acceleration import accelerate_, resolve
from moco.training.optimizer import build_optimizer
from moco.training.schedule import step_values
from moco.training.step import train_step

_WARM_UP = 2
_GIB = 2**30


def measure_costs(
    study: Study,
    runs: Sequence[PlannedRun],
    batches: Sequence[int],
    *,
    num_images: int,
    num_steps: int,
    device: str,
    memory_limit: float,
    say: Callable[[str], None],
) -> dict:
    """Cost of each row of a study at each batch.

    Args:
        runs: one of each row. batches: images of a step, ascending.
        num_images: of the data set, which sizes the memory bank.
        memory_limit: in GiB, for the batch at which memory ends.
    Returns: {"title", "source", "device", "memory_limit_gib", "rows": [{"name", "published",
        "costs": [{"batch", "seconds", "gib"} or {"batch", "error"}], "last_batch"}]}; last_batch
        follows from a straight line through the two largest batches, None with fewer than two.
    """
    rows = [{"name": row.name, "published": row.published, "costs": []} for row in study.rows]
    for batch in batches:
        for row, run, out in zip(study.rows, runs, rows, strict=True):
            cost = measure(study, row, run, batch, num_images, num_steps, device)
            out["costs"].append({"batch": batch, **cost})
            say(f"batch {batch}, {row.name}: {cost_in_words(cost)}")
    for out in rows:
        out["last_batch"] = last_batch(out["costs"], memory_limit)
    return {
        "title": study.title, "source": study.source, "device": device, "num_steps": num_steps,
        "memory_limit_gib": memory_limit, "rows": rows,
    }  # fmt: skip


def measure(
    study: Study,
    row: Row,
    run: PlannedRun,
    batch: int,
    num_images: int,
    num_steps: int,
    device: str,
) -> dict:
    """{"seconds", "gib"} of a step, or {"error"} where memory ended; in a fresh process."""
    words = [*run.overrides, "TRAIN.BATCH_SIZE", str(batch), "AUGMENT.BACKEND", "pil"]
    words += ["MOCO.QUEUE_SIZE", str(max(run.cfg.MOCO.QUEUE_SIZE, 2 * batch))]
    load_pretrain_config(study.config_file, words)  # a mistake is told here, not in the child
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    arguments = (send, study.config_file, words, num_images, num_steps, device)
    child = context.Process(target=_child, args=arguments)
    with running(child):
        send.close()
        try:
            answer = receive.recv()
        except EOFError:
            answer = {"error": "the process was killed, as it is where memory ends"}
    if "refused" in answer:
        raise ConfigError(f"{row.name}, batch {batch}: {answer['refused']}")
    return answer


def _child(send: Connection, config_file, words, num_images, num_steps, device) -> None:
    end_with_parent()
    try:
        send.send(step_cost(config_file, words, num_images, num_steps, device))
    except torch.OutOfMemoryError:
        send.send({"error": "out of memory"})
    except (ConfigError, distributed.DistributedError) as error:
        send.send({"refused": str(error)})


def step_cost(
    config_file: str, words: Sequence[str], num_images: int, num_steps: int, device: str
) -> dict:
    """Median seconds of a step and the most memory it held, in GiB, beyond an idle process's.

    On a GPU the memory is what torch allocated, on a CPU the growth of the process.
    """
    cfg = load_pretrain_config(config_file, words)
    process = distributed.setup_process(device)
    cfg = resolve(cfg, process.device).cfg
    before = _peak_rss()
    torch.manual_seed(derive_seed(cfg.SEED, "init"))
    method = build_method(cfg, num_images).to(process.device)
    accelerate_(method, cfg)
    optimizer = build_optimizer(cfg, method)
    method.train()
    generator = torch.Generator().manual_seed(0)
    size, num = cfg.DATA.SIZE, cfg.TRAIN.BATCH_SIZE
    shape = (2, num, cfg.DATA.CHANNELS, size, size)
    views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    batch = (views[0], views[1], torch.arange(num))
    seconds = []
    for step in range(_WARM_UP + num_steps):
        lr, momentum = step_values(cfg, 0, 1 << 30)
        started = time.perf_counter()
        train_step(
            method, method, optimizer, batch,
            step=step, lr=lr, momentum=momentum, cfg=cfg, process=process, measure=False,
        )  # fmt: skip
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _peak_rss() - before
    return {"seconds": statistics.median(seconds[_WARM_UP:]), "gib": peak / _GIB}


def _peak_rss() -> int:
    """Peak bytes of this process. On Linux of its own pages: getrusage's figure starts from the
    parent's, which may be larger than anything this process ever holds."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def last_batch(costs: Sequence[dict], memory_limit: float) -> int | None:
    """The largest batch within `memory_limit` GiB, by a line through the two largest measured; 0
    where the weights alone take more."""
    measured = [(c["batch"], c["gib"]) for c in costs if "gib" in c]
    if len(measured) < 2:
        return None
    (batch_a, gib_a), (batch_b, gib_b) = measured[-2:]
    slope = (gib_b - gib_a) / (batch_b - batch_a)
    if slope <= 0:
        return None
    return max(0, int(batch_b + (memory_limit - gib_b) / slope))


def cost_in_words(cost: dict) -> str:
    return cost.get("error") or f"{cost['seconds']:.3f} s, {cost['gib']:.2f} GiB a step"


def markdown(content: dict) -> str:
    """The costs as a Markdown table, seconds and memory also as multiples of the first row's."""
    published = list(dict.fromkeys(c for row in content["rows"] for c in row["published"]))
    batches = [cost["batch"] for cost in content["rows"][0]["costs"]]
    header = ["", *(f"batch {batch}: {what}" for batch in batches for what in ("s/step", "GiB"))]
    header += ["memory ends at batch", *(f"{column} published" for column in published)]
    lines = [f"# {content['title']}", "", "| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * len(header))
    first = content["rows"][0]["costs"]
    for row in content["rows"]:
        cells = [row["name"]]
        for cost, base in zip(row["costs"], first, strict=True):
            cells += [_cell(cost, base, "seconds", 3), _cell(cost, base, "gib", 2)]
        cells.append("" if row["last_batch"] is None else str(row["last_batch"]))
        cells += [str(row["published"].get(column, "")) for column in published]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Medians of {content['num_steps']} steps on {content['device']}, each row and batch in a "
        "process of its own; in brackets the multiple of the first row. Memory ends: the batch at "
        f"{content['memory_limit_gib']:.3g} GiB on a line through the two largest batches.",
    ]
    if content["source"]:
        lines.append(f"Published: {content['source']}.")
    return "\n".join(lines) + "\n"


def _cell(cost: dict, base: dict, key: str, digits: int) -> str:
    if key not in cost:
        return cost["error"]
    ratio = f" ({cost[key] / base[key]:.2f})" if key in base else ""
    return f"{cost[key]:.{digits}f}{ratio}"
