"""Linear classification, seen from two sides: this project's, and the reference's.

Both read one checkpoint of MoCo from a file, take the same uint8 images and the same initial
classifier, and run their whole loop: two batches an epoch, the second incomplete, and a test after
each epoch. `Ours` is `LinearTrainer` with these batches in place of its loaders. The reference's
side is its own main_lincls.py from `main_worker` on; only its data sets, and what moves tensors to
a GPU, are put aside.
"""

from __future__ import annotations

import contextlib
import io
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torchvision
from parity.cases import uniform
from parity.moco_sides import named_state

from moco.data.augment import normalize
from moco.evaluation import linear
from moco.evaluation.config import load_linear_config
from moco.evaluation.weights import read_pretrained
from moco.models.backbone import build_backbone

NUM_EPOCHS, NUM_STEPS = 5, 10
GOLDEN = Path(__file__).parent / "golden" / "lincls_reference.npz"
Record = dict[str, np.ndarray]  # "group" -> values of all steps


@dataclass(frozen=True)
class LinearCase:
    """A small data set. With width 1 the network is torchvision's, which has 1000 classes."""

    arch: str = "resnet18"
    width: float = 0.125
    size: int = 34
    batch: int = 6
    num_images: int = 10  # so the second batch of an epoch has 4
    num_test: int = 9
    num_classes: int = 7
    lr: float = 30.0
    seed: int = 0

    def network(self) -> nn.Module:
        if self.width == 1.0:
            return getattr(torchvision.models, self.arch)()
        return build_backbone(self.arch, num_classes=self.num_classes, width=self.width)

    def images(self, what: str, num: int) -> torch.Tensor:
        """uint8 [num, 3, size, size]."""
        shape = (num, 3, self.size, self.size)
        values = uniform(what, self.seed, int(np.prod(shape)))
        return (torch.from_numpy(values).view(shape) * 90 + 128).to(torch.uint8)

    def labels(self, what: str, num: int) -> torch.Tensor:
        values = torch.from_numpy(uniform(f"{what}, labels", self.seed, num))
        classes = 1000 if self.width == 1.0 else self.num_classes
        return ((values / 3.5 + 0.5) * classes).long().clamp(0, classes - 1)

    def train_batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        what = f"epoch {epoch}"
        images = self.images(what, self.num_images)
        labels = self.labels(what, self.num_images)
        yield from zip(images.split(self.batch), labels.split(self.batch), strict=True)

    def test_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images("test", self.num_test), self.labels("test", self.num_test)

    def write_checkpoint(self, path: Path) -> None:
        """A checkpoint of MoCo as the reference writes them, query encoder only."""
        state = named_state(self.network().state_dict(), self.seed)
        named = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 1, "arch": self.arch, "state_dict": named, "optimizer": {}}, path)


# The protocol's rate suits features far smaller than these: with it the losses run into 10^5.
CASES = {"small": LinearCase(lr=0.03), "small, rate 30": LinearCase(seed=1)}
# The network that is evaluated in earnest; too slow for the test suite.
LARGE_CASES = {"ResNet-50": LinearCase(arch="resnet50", width=1.0, size=69, lr=0.03, seed=2)}


class _Recorder:
    """What each step left behind."""

    def __init__(self):
        self.rows: dict[str, list] = {}
        self.initial: dict[str, torch.Tensor] = {}

    def add(self, group: str, tensor: torch.Tensor | float) -> None:
        tensor = torch.as_tensor(tensor, dtype=torch.float64).detach()
        values = tensor.flatten().numpy().copy()
        self.rows.setdefault(group, []).append(values)

    def add_count(self, group: str, percent: float, num: int) -> None:
        """How many of `num` are right; the reference's percentages are float32."""
        self.add(group, round(percent * num / 100))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, name in zip(optimizer.param_groups[0]["params"], ("weight", "bias"),
                                   strict=True):  # fmt: skip
            self.add(f"classifier, {name}", parameter)
            momentum = optimizer.state[parameter]["momentum_buffer"]
            self.add(f"momentum buffer, {name}", momentum)
        self.add("rate", optimizer.param_groups[0]["lr"])

    def arrays(self) -> Record:
        return {name: np.concatenate(values) for name, values in self.rows.items()}


def run_reference(case: LinearCase, folder: Path, dtype=torch.float32) -> tuple[Record, dict]:
    """The steps of the checkout that MOCO_REFERENCE names, and its initial classifier.

    Writes pretrained.pth.tar to `folder`, and what the reference writes.
    """
    module = _reference_module()
    recorder = _Recorder()
    case.write_checkpoint(folder / "pretrained.pth.tar")
    args = module.parser.parse_args(
        ["nowhere", "--arch", case.arch, "--batch-size", str(case.batch), "--lr", str(case.lr),
         "--epochs", str(NUM_EPOCHS), "--schedule", "2", "4", "--workers", "0",
         "--pretrained", str(folder / "pretrained.pth.tar")]
    )  # fmt: skip
    args.distributed = False
    accuracy = module.accuracy

    def recorded_accuracy(output, target, topk):
        found = accuracy(output, target, topk)
        if not torch.is_grad_enabled():  # of the test
            recorder.add_count("top-1", found[0].item(), case.num_test)
            recorder.add_count("top-5", found[1].item(), case.num_test)
        return found

    module.accuracy = recorded_accuracy
    module.models = types.SimpleNamespace(**{case.arch: case.network})
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.Tensor, "cuda", lambda tensor, *a, **k: tensor),
            (nn.Module, "cuda", lambda module, *a, **k: module),
            (module.datasets, "ImageFolder", lambda folder, transform: folder),
            (torch.utils.data, "DataLoader", lambda data, **k: _Batches(case, data, dtype)),
            (torch.optim, "SGD", _recording_sgd(recorder)),
            (nn, "CrossEntropyLoss", _recording_loss(recorder)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(_default_dtype(dtype))
        stack.enter_context(_working_directory(folder))
        torch.manual_seed(case.seed)
        module.main_worker(None, 1, args)
    return recorder.arrays(), recorder.initial


def _reference_module() -> types.ModuleType:
    """main_lincls.py with the one change without which no torch since 1.7 runs it: its top-5
    flattens a transposed tensor by `view`."""
    path = Path(os.environ["MOCO_REFERENCE"]) / "main_lincls.py"
    source = path.read_text(encoding="utf-8")
    assert source.count("correct[:k].view(-1)") == 1
    module = types.ModuleType("reference_main_lincls")
    module.__file__ = str(path)
    exec(compile(source.replace("[:k].view(-1)", "[:k].reshape(-1)"), path, "exec"), vars(module))
    return module


class _Batches:
    """In place of a DataLoader: the next epoch's batches, or the test batch, normalised."""

    def __init__(self, case: LinearCase, folder: str, dtype: torch.dtype):
        self.case, self.is_train, self.dtype = case, folder.endswith("train"), dtype
        self.epoch = 0

    def __len__(self) -> int:
        return 2 if self.is_train else 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        case = self.case
        batches = case.train_batches(self.epoch) if self.is_train else [case.test_batch()]
        self.epoch += 1
        for images, labels in batches:
            yield normalize(images).to(self.dtype), labels


def _recording_sgd(recorder: _Recorder) -> type:
    class Sgd(torch.optim.SGD):
        def __init__(self, parameters, *args, **options):
            super().__init__(parameters, *args, **options)
            own = self.param_groups[0]["params"]
            recorder.initial = {
                name: parameter.detach().clone()
                for name, parameter in zip(("weight", "bias"), own, strict=True)
            }

        def step(self, closure=None):
            super().step(closure)
            recorder.after_step(self)

    return Sgd


def _recording_loss(recorder: _Recorder) -> type:
    class Loss(nn.CrossEntropyLoss):
        def forward(self, logits, target):
            loss = super().forward(logits, target)
            if torch.is_grad_enabled():
                recorder.add("logits", logits)
                recorder.add("loss", loss)
            return loss

    return Loss


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class _Source:
    """The names and numbers of images, in place of a folder."""

    def __init__(self, num: int, num_classes: int):
        self.root, self.paths = "nowhere", tuple(map(str, range(num)))
        self.labels = (0,) * num
        self.class_names = tuple(map(str, range(num_classes)))

    def __len__(self) -> int:
        return len(self.paths)


class OurTrainer(linear.LinearTrainer):
    """This project's loop over the case's batches."""

    case: LinearCase

    def _train_loader(self):
        for epoch in range(NUM_EPOCHS):
            yield from self.case.train_batches(epoch)

    def _test_loader(self):
        yield *self.case.test_batch(), None


def run_ours(
    case: LinearCase,
    folder: Path,
    initial: dict[str, torch.Tensor],
    dtype=torch.float32,
    *,
    changes: tuple = (),
    change=lambda trainer: None,
) -> Record:
    """The steps of `LinearTrainer`; for the controls, configuration words or a change of it.

    Raises: CheckpointError where the backbone has moved.
    """
    from tiny import alone

    case.write_checkpoint(folder / "pretrained.pth.tar")
    cfg = load_linear_config(
        None,
        ["TRAIN.EPOCHS", str(NUM_EPOCHS), "TRAIN.BATCH_SIZE", str(case.batch),
         "TRAIN.LR", str(case.lr), "TRAIN.MILESTONES", "(2, 4)", "DATA.SIZE", str(case.size),
         *map(str, changes)],
    )  # fmt: skip
    classes = 1000 if case.width == 1.0 else case.num_classes
    trainer = OurTrainer(
        cfg,
        read_pretrained(str(folder / "pretrained.pth.tar")),
        _Source(case.num_images, classes),
        _Source(case.num_test, classes),
        folder / "run",
        alone(),
        say=lambda line: None,
    )
    trainer.case = case
    trainer.classifier.encoder.to(dtype)
    fc = trainer.classifier.encoder.fc
    with torch.no_grad():
        fc.weight.copy_(initial["weight"])
        fc.bias.copy_(initial["bias"])
    change(trainer)
    recorder = _Recorder()
    fc.register_forward_hook(
        lambda module, inputs, output: (
            recorder.add("logits", output) if torch.is_grad_enabled() else None
        )
    )
    step = linear.classify_step

    def recorded_step(classifier, optimizer, *args, **options):
        result = step(classifier, optimizer, *args, **options)
        recorder.add("loss", result.loss)
        recorder.after_step(optimizer)
        return result

    with mock.patch.object(linear, "classify_step", recorded_step):
        assert trainer.train() is None
    for scores in trainer.progress.curve:
        recorder.add_count("top-1", scores["top1"], case.num_test)
        recorder.add_count("top-5", scores["top5"], case.num_test)
    if dtype == torch.float32:
        trainer.check_backbone()
    return recorder.arrays()


def differences(ours: Record, theirs: Record) -> dict[str, float]:
    """group -> largest absolute difference over all steps and values."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    assert all(ours[group].shape == theirs[group].shape for group in ours)
    return {group: float(np.abs(ours[group] - theirs[group]).max()) for group in ours}


def relative_differences(ours: Record, theirs: Record) -> dict[str, float]:
    """As `differences`, relative to the group's largest value."""
    found = differences(ours, theirs)
    return {group: d / max(np.abs(theirs[group]).max(), 1e-12) for group, d in found.items()}
