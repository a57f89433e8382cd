"""The figures of metrics.json and TensorBoard: Detectron2's medians over 20 iterations."""

import json
import statistics
import sys

import pytest
import torch

from detection.engines import progress as progress_module
from detection.engines.progress import Progress, record_final_scores


def losses(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for values in torch.rand(count, 2, generator=generator):
        yield {"loss_a": values[0], "loss_b": values[1] ** 5}


def written(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def make(folder, start=0, end=50, period=7, **options):
    return Progress(folder, start=start, end=end, period=period, show=False, **options)


def record(progress, count, start=0, seed=0):
    for iteration, values in enumerate(losses(count, seed), start=start):
        progress.begin()
        progress.loaded()
        progress.report(iteration, values, 0.1 * iteration)


def test_figures_are_medians_of_the_last_20_iterations(tmp_path):
    record(make(tmp_path), 50)
    rows = [[value.item() for value in values.values()] for values in losses(50)]
    records = written(tmp_path)
    assert [r["iteration"] for r in records] == [6, 13, 20, 27, 34, 41, 48, 49]
    for found in records:
        done = found["iteration"] + 1
        window = rows[max(0, done - 20) : done]
        assert found["loss_a"] == statistics.median(row[0] for row in window)
        assert found["loss_b"] == statistics.median(row[1] for row in window)
        assert found["total_loss"] == statistics.median(map(sum, window))
        assert found["lr"] == 0.1 * found["iteration"]
    # Control: neither the mean nor the last value, nor the sum of the losses' medians.
    found, window = records[3], rows[8:28]
    assert found["loss_b"] not in (statistics.mean(row[1] for row in window), rows[27][1])
    assert found["total_loss"] != found["loss_a"] + found["loss_b"]


def test_a_resumed_session_goes_on_with_the_window_it_is_given(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    record(make(whole), 50)
    first = make(cut)
    for iteration, values in enumerate(losses(33)):
        first.report(iteration, values, 0.1 * iteration)
        if iteration == 29:
            saved = json.loads(json.dumps(first.recent_losses()))
    second = make(cut, start=30, losses=saved)
    for iteration, values in list(enumerate(losses(50)))[30:]:
        second.report(iteration, values, 0.1 * iteration)
    timed = ("time", "data_time", "eta_seconds")
    without = [[{k: v for k, v in r.items() if k not in timed} for r in written(folder)]
               for folder in (whole, cut)]  # fmt: skip
    assert without[0] == without[1]


def test_times_leave_out_the_first_two_iterations(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock[0])
    progress = make(tmp_path, end=4, period=1)
    for iteration, (values, seconds) in enumerate(zip(losses(4), (50, 40, 3, 5), strict=True)):
        progress.begin()
        clock[0] += 1
        progress.loaded()
        clock[0] += seconds - 1
        progress.report(iteration, values, 0.1)
        clock[0] += 1000  # a checkpoint or an evaluation
    assert [r["time"] for r in written(tmp_path)] == [50, 45, 3, 4]
    assert [r["eta_seconds"] for r in written(tmp_path)] == [150, 90, 3, 0]
    assert {r["data_time"] for r in written(tmp_path)} == {1}


def test_scores_are_lines_of_their_own_and_dropped_with_their_iteration(tmp_path):
    progress = make(tmp_path, end=20, period=10)
    record(progress, 10)
    progress.scores(9, {"bbox/AP": 12.5, "bbox/AP75": None})
    assert written(tmp_path)[-1] == {"iteration": 9, "bbox/AP": 12.5}
    record(make(tmp_path, start=10, end=20, period=10), 10, start=10)
    for _ in range(2):  # scored again after a kill
        record_final_scores(tmp_path, 20, {"bbox/AP": 50.0}, tensorboard=False)
    assert [(r["iteration"], r.get("bbox/AP")) for r in written(tmp_path)] == [
        (9, None), (9, 12.5), (19, None), (20, 50.0)
    ]  # fmt: skip
    make(tmp_path, start=9)
    assert written(tmp_path) == []


def test_tensorboard_has_the_same_figures_and_drops_what_is_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress = make(tmp_path, end=20, period=5, tensorboard=True)
    record(progress, 15)
    progress.close()
    progress = make(tmp_path, start=10, end=20, period=5, tensorboard=True)
    record(progress, 10, start=10, seed=1)
    progress.scores(14, {"bbox/AP": 12.5})
    progress.close()
    record_final_scores(tmp_path, 20, {"bbox/AP": 50.0}, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("total_loss", "loss_a", "loss_b", "lr", "time", "bbox/AP"):
        wanted = [(r["iteration"], r[name]) for r in written(tmp_path) if name in r]
        found = {event.step: event.value for event in events.Scalars(name)}
        assert list(found) == [step for step, _ in wanted]
        assert list(found.values()) == pytest.approx([value for _, value in wanted])


def test_without_tensorboard_its_package_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    record(make(tmp_path), 50)
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(ImportError):
        make(tmp_path, tensorboard=True)


@pytest.mark.detectron2
def test_figures_are_those_of_detectron2s_own_writer(tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.utils.events import EventStorage, JSONWriter

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    record(make(ours), 50)
    writer = JSONWriter(str(theirs / "metrics.json"))
    with EventStorage() as storage:
        for iteration, values in enumerate(losses(50)):
            storage.iter = iteration
            figures = {name: value.item() for name, value in values.items()}
            storage.put_scalars(total_loss=sum(figures.values()), **figures)
            storage.put_scalar("lr", 0.1 * iteration, smoothing_hint=False)
            if (iteration + 1) % 7 == 0 or iteration == 49:
                writer.write()
    writer.close()
    wanted = written(theirs)
    assert len(wanted) == 8 and wanted[-1].keys() >= {"loss_a", "loss_b", "total_loss", "lr"}
    assert [{key: r[key] for key in wanted[0]} for r in written(ours)] == wanted
