"""Detection on two gloo processes, and on two machines of one process each."""

import json
import multiprocessing
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import in_processes
from torch import nn

from detection import train_net, trials
from detection.config import load_detection_config
from detection.data.shapes import make_shapes_dataset
from detection.engines.embedded.engine import EmbeddedEngine
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.norm import NaiveSyncBatchNorm2d
from detection.engines.embedded.precise_bn import update_bn_statistics
from moco import distributed
from moco.distributed import ProcessInfo
from moco.errors import ConfigError

ROOT = Path(train_net.__file__).resolve().parents[1]
CPU = torch.device("cpu")
# Nothing is left to chance: every anchor and region is trained on, and each image has as many
# regions, 10 proposals and 2 ground-truth boxes, for losses are means over a process's regions.
ALL_SAMPLED = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 2048,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 10,
}
NORMS = ("", "BN", "naiveSyncBN")
# Largest difference from one process, relative to the parameter's largest gradient, in double
# precision: batches of 1 and 2 images add up in another order. (In single precision it is 3e-4.)
TOLERANCE = {"": 1e-12, "naiveSyncBN": 1e-9}


def make_images():
    """Two images of equal size, for padding would be another difference, with two boxes each."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 117, 165), generator=generator, dtype=torch.uint8)
    boxes = ([[10.0, 20.0, 70.0, 90.0], [80.0, 5.0, 160.0, 60.0]],
             [[0.0, 0.0, 50.0, 40.0], [60.0, 30.0, 110.0, 110.0]])  # fmt: skip
    classes = ([0, 2], [1, 1])
    return [
        {"image": image, "gt_boxes": torch.tensor(b), "gt_classes": torch.tensor(c)}
        for image, b, c in zip(pixels, boxes, classes, strict=True)
    ]


def gradients(norm, batch, process):
    """(losses, number of regions, name -> gradient) of one step on this process's images, in
    double precision but for the box coordinates and the logits, which are always single."""
    keys = {**ALL_SAMPLED, "MODEL.RESNETS.NORM": norm}
    cfg = load_detection_config(None, [str(word) for pair in keys.items() for word in pair])
    torch.manual_seed(0)
    model = build_model(cfg).double()
    model.roi_heads.pooler.register_forward_pre_hook(
        lambda module, inputs: (inputs[0], inputs[1].double())
    )
    regions = []
    model.roi_heads.box_predictor.register_forward_pre_hook(
        lambda module, inputs: regions.append(len(inputs[0]))
    )
    forward = model if process.world_size == 1 else distributed.data_parallel(model, process)
    losses = forward(batch)
    sum(losses.values()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()}, regions, found


def precise_batches(rank):
    """Of other sizes and another mean on each rank."""
    generator = torch.Generator().manual_seed(rank)
    sizes = ((1, 4, 5), (1, 9, 7)) if rank == 0 else ((1, 8, 11), (1, 3, 2))
    return [torch.randn(n, 3, h, w, generator=generator) + rank + h for n, h, w in sizes]


def precise_statistics(update, rank):
    model = nn.Sequential(NaiveSyncBatchNorm2d(3))
    update(model, precise_batches(rank), 2)
    return model[0].running_mean, model[0].running_var


TINY = """
_BASE_: "{base}"
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}}
  RPN: {{PRE_NMS_TOPK_TRAIN: 100, POST_NMS_TOPK_TRAIN: 30, PRE_NMS_TOPK_TEST: 100}}
  ROI_HEADS: {{NUM_CLASSES: 2, BATCH_SIZE_PER_IMAGE: 16}}
INPUT: {{MIN_SIZE_TRAIN: [61], MIN_SIZE_TEST: 61}}
DATASETS:
  VOC_ROOT: "{root}"
  VOC_CLASSES: [circle, square]
  TRAIN: [train]
  TEST: [test]
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 2, STEPS: [1], WARMUP_ITERS: 1, BASE_LR: 0.01}}
TEST: {{PRECISE_BN: {{NUM_ITER: 1}}}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    root = make_shapes_dataset(
        folder / "shapes", num_train=4, num_test=2, num_unlabelled=0, size=64, seed=0,
        class_names=("circle", "square"),
    )  # fmt: skip
    path = folder / "tiny.yaml"
    base = ROOT / "configs/detection/pascal_voc_R_50_C4_24k_moco.yaml"
    path.write_text(TINY.format(base=base, root=root))
    return path


def _on_two(rank, config, out):
    """All that needs a process group, in one start of two processes."""
    from fvcore.nn.precise_bn import update_bn_stats

    process = ProcessInfo(rank, 2, rank, CPU)
    cfg = load_detection_config(str(config), ["OUTPUT_DIR", str(out)])
    trials.run_single(trials.prepare(cfg, EmbeddedEngine(), "test", process), resume=False)
    try:
        nn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4))
        sync_bn = "runs"
    except (ValueError, RuntimeError) as error:
        sync_bn = str(error)
    return {
        "gradients": {norm: gradients(norm, make_images()[rank : rank + 1], process)
                      for norm in NORMS},
        "precise": precise_statistics(update_bn_statistics, rank),
        "precise of fvcore": precise_statistics(update_bn_stats, rank),
        "SyncBN": sync_bn,
    }  # fmt: skip


@pytest.fixture(scope="module")
def two_processes_run(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "processes"


@pytest.fixture(scope="module")
def two(tmp_path_factory, config, two_processes_run):
    return in_processes(_on_two, tmp_path_factory.mktemp("two"), config, two_processes_run)


def largest_difference(found, expected):
    return max(
        float((found[name] - gradient).abs().max() / gradient.abs().max())
        for name, gradient in expected.items()
        if gradient.abs().max() > 0
    )


@pytest.mark.parametrize("norm", TOLERANCE)
def test_two_processes_with_an_image_equal_one_with_both(two, norm):
    first, second = (rank["gradients"][norm] for rank in two)
    # With one process, naiveSyncBN is plain batch norm over both images.
    losses, regions, expected = gradients(norm, make_images(), ProcessInfo(0, 1, 0, CPU))
    assert first[1] == second[1] == [12] and regions == [24]
    for name, loss in losses.items():
        assert float((first[0][name] + second[0][name]) / 2) == pytest.approx(float(loss), rel=1e-4)
        assert float(loss) > 0 and not torch.equal(first[0][name], second[0][name])
    assert all(torch.equal(first[2][name], second[2][name]) for name in expected)
    assert largest_difference(first[2], expected) < TOLERANCE[norm]


def test_negative_control_batch_norm_of_each_process_is_another_network(two):
    """Also: plain batch norm runs on two processes."""
    expected = gradients("BN", make_images(), ProcessInfo(0, 1, 0, CPU))[2]
    assert largest_difference(two[0]["gradients"]["BN"][2], expected) > 0.1


def test_precise_statistics_agree_as_fvcores_do_not(two):
    (mean, variance), other = (rank["precise"] for rank in two)
    assert torch.equal(mean, other[0]) and torch.equal(variance, other[1])
    # By hand: within a batch ranks weigh the same, batches weigh by the pixels of both.
    pairs = list(zip(*(precise_batches(rank) for rank in (0, 1)), strict=True))
    weights = torch.tensor([float(sum(x[0, 0].numel() for x in pair)) for pair in pairs])
    means = torch.stack([sum(x.mean((0, 2, 3)) for x in pair) / 2 for pair in pairs])
    torch.testing.assert_close(mean, (means * weights[:, None]).sum(0) / weights.sum())
    # Negative control (Detectron2 issue 5398): fvcore weighs by the rank's own pixels.
    first, second = (rank["precise of fvcore"][0] for rank in two)
    assert (first - second).abs().max() > 0.1


def test_sync_bn_on_cpu_processes_is_refused_before_anything_is_read(two, config, capsys):
    assert all("SyncBatchNorm" in rank["SyncBN"] for rank in two)  # what torch would say, later
    cfg = load_detection_config(None, ["MODEL.RESNETS.NORM", "SyncBN"])
    with pytest.raises(ConfigError, match="set MODEL.RESNETS.NORM naiveSyncBN") as caught:
        trials.prepare(cfg, EmbeddedEngine(), "test", ProcessInfo(0, 2, 0, CPU))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN: is empty"):  # alone it is allowed
        trials.prepare(cfg, EmbeddedEngine(), "test", ProcessInfo(0, 1, 0, CPU))
    words = ["--device", "cpu", "--num-gpus", "2", "MODEL.RESNETS.NORM", "SyncBN"]
    with pytest.raises(SystemExit) as exit_:  # in one line, not in one a process
        train_net.main(["--config-file", str(config), *words])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and "naiveSyncBN" in error


def flags(config, out, *words):
    words = ["--config-file", config, "--device", "cpu", "--engine", "embedded", *words]
    return [str(word) for word in [*words, "OUTPUT_DIR", out]]


def call(words):
    """In this process; raises where the exit status is not 0."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        train_net.main(words)
    except SystemExit as exit_:
        if exit_.code:
            raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def trained(folder):
    """(weights and statistics, scores) of a run."""
    model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    result = json.loads((folder / "result.json").read_text())
    result.pop("seconds")
    return model, result


def assert_same_run(one, other):
    (model, result), (other_model, other_result) = trained(one), trained(other)
    assert result == other_result
    assert model.keys() == other_model.keys() and len(model) == 333
    assert all(torch.equal(model[name], other_model[name]) for name in model)


def test_two_machines_of_one_process_equal_one_machine_of_two(
    two, two_processes_run, config, tmp_path, monkeypatch
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    machines = ("--num-machines", 2, "--num-gpus", 1, "--dist-url", url, "--machine-rank")
    # Signal handlers belong to the main thread; both machines wait for each other here.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(call, flags(config, tmp_path / "machines", *machines, rank))
            for rank in range(2)
        ]
        try:
            for machine in done:
                machine.result(timeout=300)
        finally:  # where one failed, the other would wait for it for half an hour
            for child in multiprocessing.active_children():
                child.terminate()
    assert_same_run(tmp_path / "machines", two_processes_run)
    assert trained(tmp_path / "machines")[1]["num_processes"] == 2


def test_trials_side_by_side_equal_those_one_after_the_other(config, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process: more threads, other sums
    parallel = ("--trials", 2, "--trials-parallel", "--num-gpus", 2)
    call(flags(config, tmp_path / "parallel", *parallel))
    call(flags(config, tmp_path / "serial", "--trials", 2))
    for k in range(2):
        assert_same_run(tmp_path / "parallel" / f"trial_{k}", tmp_path / "serial" / f"trial_{k}")
    both = [json.loads((tmp_path / name / "results.json").read_text())
            for name in ("parallel", "serial")]  # fmt: skip
    for results in both:
        for trial in results["trials"]:
            trial.pop("seconds")
    assert both[0] == both[1]
    for name in ("results.md", "per_class.csv", "pr_curves.csv"):
        files = [(tmp_path / run / name).read_bytes() for run in ("parallel", "serial")]
        assert files[0] == files[1]
    # Negative control: the two trials are no copies of one another.
    states = [trained(tmp_path / "serial" / f"trial_{k}")[0] for k in range(2)]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(states[0][name], states[1][name])
