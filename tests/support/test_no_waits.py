"""On the pretend GPU: no mixed devices, and no wait in a step that does not log.

`python tests/support/print_waits.py` prints the same as a table (docs/PERFORMANCE.md).
"""

from __future__ import annotations

from collections import Counter

import linear_runs
import pytest
import tiny
import torch

from moco import distributed
from moco.data import augment, augment_device
from moco.methods import end_to_end
from moco.training import prefetch
from support import detector_runs, device_runs
from support.device_runs import BACKENDS, PRECISIONS, Outcome


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return device_runs.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return linear_runs.write_weights(tmp_path_factory.mktemp("weights"))


def assert_no_waits(outcome: Outcome) -> None:
    assert (outcome.mixed, outcome.waits) == ("", {}), outcome.name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_step_of_every_method(images, variant, backend, precision):
    assert_no_waits(device_runs.pretraining_step(images, variant, backend, precision))


@pytest.mark.parametrize("variant", ["moco", "moco_symmetric", "memory_bank", "moco_v3"])
def test_a_step_in_parts(images, variant):
    keys = {"TRAIN__ACCUMULATION_STEPS": 2, "MODEL__BN_SPLITS": 1}
    assert_no_waits(device_runs.pretraining_step(images, variant, **keys))


@pytest.mark.parametrize("backend", ["opencv", "device"])
def test_a_whole_run_and_its_continuation(images, tmp_path, backend):
    assert_no_waits(device_runs.pretraining_run(images, tmp_path, **BACKENDS[backend]))


@pytest.mark.parametrize(
    "keys", [{}, {"TRAIN__AMP": True, "TRAIN__CHANNELS_LAST": True}, {"FINETUNE__ENABLED": True}]
)
def test_a_step_of_linear_classification(images, weights, tmp_path, keys):
    assert_no_waits(device_runs.linear_step(images, weights, tmp_path / "run", **keys))


def test_a_batch_of_test_images(images, weights, tmp_path):
    assert_no_waits(device_runs.linear_test_batch(images, weights, tmp_path))


def test_a_block_of_knn(images, weights):
    assert_no_waits(device_runs.knn_block(images, weights))


# Of an iteration of two images: what decides how much there is to compute next has to be read.
OF_TRAINING = Counter(
    {
        "count_true": 6,  # RPN: sampled anchors of each image, of all, usable boxes; ROI: of each
        "_suppress": 2,  # non-maximum suppression of each image
        "losses": 1,  # foreground regions
        "check_losses": 1,  # finite everywhere, asked to stop anywhere
    }
)
OF_TEST = Counter(
    {"count_true": 1, "_suppress": 1, "_detect_one": 4, "_to_wanted_size": 1, "_detect": 1}
)
OF_MASKS = {
    "fp32": (Counter(), Counter()),
    "bf16, channels last": (Counter(), Counter()),
    "SyncBN": (Counter(), Counter()),
    # Polygons are drawn on the CPU, of each image; masks are read as numbers and as pixels.
    "polygons": (Counter(count_true=1, crop_masks=2), Counter(encode_masks=2)),
    "bit masks": (Counter(count_true=1), Counter(encode_masks=2)),
}


@pytest.fixture(scope="module")
def detector_outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    return {outcome.name: outcome for outcome in detector_runs.all_runs(folder)}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", OF_MASKS)
def test_the_detector_waits_only_where_its_work_depends_on_it(detector_outcomes, kind):
    of_masks = OF_MASKS[kind]
    for part, wanted in {
        "training": OF_TRAINING + of_masks[0], "test": OF_TEST + of_masks[1]
    }.items():  # fmt: skip
        outcome = detector_outcomes[f"detector, {kind}, {part}"]
        waits: Counter = Counter()
        for (_, place), num in outcome.waits.items():
            waits[place.split()[-1]] += num
        assert (outcome.mixed, waits) == ("", wanted), outcome.name


# Negative control: what was mended is put back, and found.


def test_tables_on_the_gpu_are_found(images, monkeypatch):
    monkeypatch.setattr(prefetch, "_ON_DEVICE", 5)
    outcome = device_runs.pretraining_step(images, "moco", "device")
    assert outcome.num_waits == 14
    assert {place.split(":")[0] for _, place in outcome.waits} == {"moco/data/augment_device.py"}


def test_a_blocking_copy_of_a_permutation_is_found(images, monkeypatch):
    monkeypatch.setattr(end_to_end, "send", lambda tensor, device: tensor.to(device))
    outcome = device_runs.pretraining_step(images, "end_to_end")
    [((kind, place), num)] = outcome.waits.items()
    assert kind == "copy to cuda, blocking" and num == 1
    assert place.startswith("moco/methods/end_to_end.py") and place.endswith("_all_keys")


def test_copies_that_are_not_pinned_are_found(images, monkeypatch):
    def unpinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    for module in (distributed, augment_device):
        monkeypatch.setattr(module, "send", unpinned)
    outcome = device_runs.pretraining_step(images, "moco", "device")
    assert {kind for kind, _ in outcome.waits} == {"copy to cuda, not pinned"}
    assert outcome.num_waits >= 5


def test_mixed_devices_are_found(images, monkeypatch):
    def on_the_cpu(values, device):
        return torch.tensor(values).view(-1, 1, 1)

    monkeypatch.setattr(augment, "_constant", on_the_cpu)
    outcome = device_runs.pretraining_step(images, "moco")
    assert "aten::div_: (4, 3, 16, 16) cuda, (1, 1, 1) cpu" in outcome.mixed
    assert "moco/data/augment.py" in outcome.mixed
