"""Kinds of devices: what is accepted, what float32 means on a GPU, and memory that runs out."""

from __future__ import annotations

import pytest
import tiny
import torch
from support.device_runs import PROCESS, make_images
from support.pretend_cuda import DEVICE, pretend_cuda

from moco import devices, distributed
from moco.config import load_pretrain_config
from moco.data.images import find_images
from moco.devices import out_of_memory_as_error, send, set_arithmetic
from moco.errors import ConfigError, DeviceMemoryError, DistributedError
from moco.models.norm import SyncBatchNorm
from moco.training import trainer as trainer_module
from moco.training.acceleration import resolve
from moco.training.recipe import resolve_recipe

# As torch.OutOfMemoryError says it (CUDACachingAllocator.cpp).
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.74 GiB of "
    "which 1.06 GiB is free. Process 77 has 13.67 GiB memory in use. Of the allocated memory "
    "13.1 GiB is allocated by PyTorch, and 431 MiB is reserved by PyTorch but unallocated. If "
    "reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF"
)


@pytest.fixture
def arithmetic():
    """Puts back what a test changed."""
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
    torch.backends.cudnn.benchmark = before[2]


def given():
    backends = torch.backends
    return (
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    )  # fmt: skip


def test_float32_is_full_precision_unless_asked(arithmetic):
    set_arithmetic(torch.device("cuda"))
    assert given() == (False, False, True)
    set_arithmetic(torch.device("cuda"), tf32=True, fixed_shapes=False)
    assert given() == (True, True, False)
    set_arithmetic(torch.device("cpu"))  # changes nothing
    assert given() == (True, True, False)


@pytest.mark.parametrize(
    "words, tf32",
    [
        ([], False),
        (["TRAIN.TF32", "True"], True),
        (["TRAIN.TF32", "True", "TRAIN.REFERENCE", "True"], False),
    ],
)
def test_the_key_decides_and_the_reference_overrides_it(arithmetic, tmp_path, words, tf32):
    cfg = load_pretrain_config(None, [*tiny.overrides(), *words])
    source = find_images(str(make_images(tmp_path / "images") / "train"))
    with pretend_cuda():
        text = resolve(cfg, DEVICE).text
        trainer_module.Trainer(cfg, source, tmp_path / "run", PROCESS, say=lambda line: None)
    assert given() == (tf32, tf32, True)
    assert f"float32 products in {'TF32' if tf32 else 'full'} precision" in text


def test_send_keeps_values_and_what_is_there():
    with pretend_cuda():
        there = send(torch.arange(3), DEVICE)
        assert there.is_cuda and there.tolist() == [0, 1, 2] and send(there, DEVICE) is there
    here = torch.arange(3)
    assert send(here, torch.device("cpu")) is here


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_gpus_drive_one_process(kind, monkeypatch):
    backend = torch.backends.mps if kind == "mps" else torch.xpu
    monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(DistributedError, match=f"'{kind}' was asked for, torch sees none"):
        distributed.setup_process(kind)
    monkeypatch.setattr(backend, "is_available", lambda: True)
    process = distributed.setup_process(kind)
    assert (process.device, process.world_size) == (torch.device(kind, 0), 1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="allowed is one process, WORLD_SIZE is 2"):
        distributed.setup_process(kind)


def test_other_gpus_compute_in_float32():
    resolved = resolve(load_pretrain_config(None), torch.device("mps"))
    assert resolved.cfg.TRAIN.AMP is False and resolved.cfg.TRAIN.COMPILE == "eager"
    assert "float32 (lower precision was not tried on mps)" in resolved.text


def test_an_unknown_device_is_refused():
    with pytest.raises(DistributedError, match="allowed: auto, cpu, cuda, mps, xpu"):
        distributed.setup_process("tpu")


@pytest.mark.parametrize(
    "capability, words, wanted",
    [
        ((7, 5), [], "has no bfloat16"),
        ((7, 0), ["TRAIN.AMP", "True"], "only emulates bfloat16"),
        ((7, 5), ["TRAIN.AMP_DTYPE", "float16"], None),
        ((7, 5), ["TRAIN.REFERENCE", "True"], None),
        ((8, 0), [], None),
    ],
)
def test_a_gpu_without_bfloat16_warns(monkeypatch, capability, words, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    text = resolve(load_pretrain_config(None, words), torch.device("cuda")).text
    assert (wanted is not None) == ("warning" in text), text
    if wanted:
        assert f"this GPU (capability {capability[0]}.{capability[1]}) {wanted}" in text
        assert "TRAIN.AMP_DTYPE float16" in text


def test_float16_is_taken_where_asked_and_refused_on_a_cpu(monkeypatch):
    cfg = load_pretrain_config(None, ["TRAIN.AMP_DTYPE", "float16"])
    for capability, amp in (((6, 1), False), ((7, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve(cfg, torch.device("cuda")).cfg.TRAIN.AMP is amp
    with pytest.raises(ConfigError, match="AMP_DTYPE is float16 on cpu; allowed: on a CUDA GPU"):
        resolve(cfg, torch.device("cpu"))


def test_out_of_memory_is_one_line():
    with pytest.raises(DeviceMemoryError) as caught:
        with out_of_memory_as_error(lambda: "step 3", lambda: "Lower X"):
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    assert str(caught.value) == (
        "step 3: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
        "14.74 GiB of which 1.06 GiB is free. Process 77 has 13.67 GiB memory in use. Lower X"
    )


def test_out_of_memory_in_a_step_says_what_to_lower(tmp_path, monkeypatch):
    source = find_images(str(make_images(tmp_path / "images") / "train"))
    run = trainer_module.Trainer(
        tiny.config(), source, tmp_path / "run", tiny.alone(), say=lambda line: None
    )

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(trainer_module, "train_step", fail)
    with pytest.raises(DeviceMemoryError) as caught:
        run.train()
    text = str(caught.value)
    assert text.startswith("step 0 (rank 0): CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "This run's estimate is 0.0" in text and "Raise TRAIN.ACCUMULATION_STEPS" in text
    assert "TRAIN.BATCH_SIZE" in text and "--resume" in text and "\n" not in text


def test_the_dry_run_sets_the_estimate_beside_the_card():
    cfg = load_pretrain_config(None, ["TRAIN.AMP", "False"])
    fits = resolve_recipe(cfg, num_images=1_281_167, world_size=1, device_memory=80 << 30)
    assert " GiB of the GPU's 80.00; weights" in fits.text()
    assert "above the GPU's memory" not in fits.text()
    small = resolve_recipe(cfg, num_images=1_281_167, world_size=1, device_memory=8 << 30)
    assert "the estimate is above the GPU's memory. Raise TRAIN.ACCUMULATION_STEPS" in small.text()
    with pretend_cuda():
        assert devices.memory_of(DEVICE) == 80 << 30
    assert devices.memory_of(torch.device("cpu")) is None


def test_synchronised_norm_is_torchs_on_a_gpu(monkeypatch):
    called = []
    monkeypatch.setattr(
        torch.nn.SyncBatchNorm, "forward", lambda self, x: called.append(type(self)) or x
    )
    images = torch.randn(4, 3, 2, 2)
    with pretend_cuda():
        SyncBatchNorm(3).to(DEVICE)(images.to(DEVICE))
    assert called == [SyncBatchNorm]
    SyncBatchNorm(3)(images)
    assert called == [SyncBatchNorm]


def test_torchs_synchronised_norm_takes_ours_as_itself():
    """torch's forward on ours, alone: what it asks of a layer is there."""
    images = torch.randn(4, 3, 2, 2)
    ours, theirs = SyncBatchNorm(3), torch.nn.BatchNorm2d(3)
    with pretend_cuda():
        found = ours.to(DEVICE)(images.to(DEVICE)).cpu()
    assert torch.equal(found, theirs(images))
    assert torch.equal(ours.running_var, theirs.running_var)
