"""Ranks that should hold the same state: compared every TRAIN.RANK_CHECK_PERIOD steps, the odd one
named."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from processes import in_processes

from moco import distributed
from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.errors import ConfigError, DistributedError
from moco.training.trainer import Trainer

CPU = torch.device("cpu")


def flip_last_bit(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(torch.uint8).view(-1)[-4] ^= 1  # the lowest bit of the last float32


def message_of(state, what) -> str:
    """What the comparison says; empty where all ranks agree."""
    try:
        distributed.check_equal_across_ranks(state, what, CPU)
    except DistributedError as error:
        return str(error)
    return ""


def _compare(rank):
    def state():
        draws = torch.Generator().manual_seed(0)
        return {"a": torch.randn(5, generator=draws), "b": torch.randn(3, 2, generator=draws)}

    found = [message_of(state(), "equal")]
    odd = state()
    if rank == 1:
        flip_last_bit(odd["b"])
    found.append(message_of(odd, "step 7"))
    swapped = state()
    if rank == 0:
        swapped["a"] = swapped["a"][[1, 0, 2, 3, 4]]
    found.append(message_of(swapped, "step 8"))
    named = state()
    if rank == 1:
        named["c"] = named.pop("b")
    found.append(message_of(named, "step 9"))
    each = {name: tensor + rank for name, tensor in state().items()}
    return [*found, message_of(each, "step 10")]


def test_three_ranks_name_the_one_that_differs(tmp_path):
    ranks = in_processes(_compare, tmp_path, num=3)
    assert ranks[0] == ranks[1] == ranks[2]  # all of them stop, with the same words
    equal, odd, swapped, named, each = ranks[0]
    assert equal == ""
    pattern = r"step 7: rank 1 \(host \S+\) differs from the 2 ranks that agree, in b\. Resume"
    assert re.match(pattern, odd), odd
    assert re.match(r"step 8: rank 0 \(host .* agree, in a\.", swapped), swapped
    assert re.match(r"step 9: rank 1 .*, in names, shapes or types of the tensors\.", named), named
    assert each.startswith("step 10: no majority of ranks agrees: checksum "), each
    assert "in a and 1 more tensors" in each and each.count("checksum") == 3


def test_two_ranks_cannot_outvote_each_other_so_both_are_shown(tmp_path):
    first, second = in_processes(_compare, tmp_path)
    assert first == second and first[0] == ""
    pattern = (
        r"step 7: no majority of ranks agrees: checksum [0-9a-f]{16} on rank 0 \(host \S+\); "
        r"checksum [0-9a-f]{16} on rank 1 \(host \S+\), in b\."
    )
    assert re.match(pattern, first[1]), first[1]


PLACES = {
    "encoder_q.conv1.weight": lambda trainer: trainer.method.encoder_q.conv1.weight,
    "encoder_k.fc.2.bias": lambda trainer: trainer.method.encoder_k.fc[2].bias,
    "queue": lambda trainer: trainer.method.queue,
    "momentum_buffer of encoder_q.conv1.weight": lambda trainer: trainer.optimizer.state[
        trainer.method.encoder_q.conv1.weight
    ]["momentum_buffer"],
}


class FlipOnRank1:
    """Changes one bit of one rank's state after step 3."""

    def __init__(self, trainer, place):
        self.trainer, self.place = trainer, place

    def on_step(self, record):
        if record.step == 3 and self.trainer.process.rank == 1:
            flip_last_bit(PLACES[self.place](self.trainer))

    def on_epoch(self, record):
        pass


def _train(rank, images, folder):
    """Error messages (empty: trained to the end) of runs in which a bit flips, or none."""

    def run(place, period):
        cfg = tiny.config(
            TRAIN__BATCH_SIZE=6, TRAIN__EPOCHS=2, TRAIN__RANK_CHECK_PERIOD=period,
            MODEL__BN_SPLITS=1, MOCO__QUEUE_SIZE=60, KNN__PERIOD=0,
        )  # fmt: skip
        process = ProcessInfo(rank, 3, rank, CPU)
        trainer = Trainer(
            cfg, find_images(images), folder / f"{place}-{period}", process, say=lambda line: None
        )
        try:
            trainer.train([FlipOnRank1(trainer, place)] if place else [])
        except DistributedError as error:
            return str(error)
        return ""

    found = {place: run(place, 2) for place in PLACES}
    return {**found, "unchanged": run(None, 1), "seldom": run("queue", 0)}


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("rank_check")
    (folder / "images").mkdir()
    for i in range(32):
        Image.new("RGB", (20, 20), (8 * i, 255 - 6 * i, 100)).save(folder / f"images/{i:02d}.png")
    ranks = in_processes(_train, folder, folder / "images", folder / "runs", num=3)
    assert ranks[0] == ranks[1] == ranks[2]
    return ranks[0], folder / "runs"


@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_bit_stops_the_job_within_the_period(messages, place):
    found, folder = messages
    pattern = rf"step 4: rank 1 \(host \S+\) differs from the 2 ranks that agree, in .*{place}"
    if place != "queue":  # what is wrong spreads in one step
        pattern = r"step 4: rank 1 \(host \S+\) differs from the 2 ranks that agree, in "
    assert re.match(pattern, found[place]), found[place]
    assert not list(folder.glob(f"{place}-2/checkpoint*"))


def test_equal_ranks_train_to_the_end_and_period_0_compares_at_checkpoints_only(messages):
    found, folder = messages
    assert found["unchanged"] == ""
    assert list(folder.glob("None-1/checkpoint_0001.pth.tar"))
    assert found["seldom"].startswith("step 5: rank 1"), found["seldom"]  # 5 steps are an epoch


def _given_something_else(rank, images, folder):
    found = []
    for name, seed in (("other_images", 0), ("other_seed", rank)):
        source = find_images(images / "train/a" if name == "other_images" and rank else images)
        process = ProcessInfo(rank, 2, rank, CPU)
        with pytest.raises(DistributedError) as caught:
            Trainer(tiny.config(SEED=seed), source, folder / name, process, say=print)
        found.append(str(caught.value))
    return found


def test_ranks_given_other_images_or_another_configuration_stop_before_training(
    image_folder, tmp_path
):
    for found in in_processes(_given_something_else, tmp_path, image_folder, tmp_path / "runs"):
        assert found[0].startswith("before training: the list of images of ranks [1] is not that")
        assert found[1].startswith("before training: the configuration of ranks [1] is not that of")


def test_a_negative_period_is_refused():
    with pytest.raises(ConfigError, match="TRAIN.RANK_CHECK_PERIOD is -1; allowed: 0 or more"):
        tiny.config(TRAIN__RANK_CHECK_PERIOD=-1)
