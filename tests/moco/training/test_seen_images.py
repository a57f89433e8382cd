"""The images a run has trained on: in checkpoints, over stops, ranks and changes of the list."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pretrain_runs import make_images
from processes import in_processes

from detection.convert import convert_checkpoint
from moco.data.first_sight import Seen
from moco.data.image_hash import hash_file
from moco.data.image_rows import ROW_BYTES
from moco.data.images import find_images
from moco.data.sampler import EpochStream
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError
from moco.training import checkpoint as ckpt
from moco.training.export import export_backbone
from moco.training.image_record import KEY, ImageRecord, Unknown, record_beside, record_in
from moco.training.seen_images import SeenImages
from moco.training.trainer import Trainer

FIRST, LAST = "checkpoint_0000.pth.tar", "checkpoint_0002.pth.tar"
STOPPED = "checkpoint_step_{}.pth.tar"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """34 images: two of each epoch do not fill a batch of 8."""
    return make_images(tmp_path_factory.mktemp("images"), 34)


def content_of(folder, name=LAST):
    return ckpt.read_torch_file(folder / name)


def rows_in(folder, name=LAST) -> set[bytes]:
    record = record_in(content_of(folder, name), name)
    assert isinstance(record, ImageRecord) and record.lacks == ""
    return {row.tobytes() for row in record.rows}


def rows_shown(images, num_steps) -> set[bytes]:
    """Of the images that the order shows in the first steps."""
    source = find_images(images)
    stream = EpochStream(num_images=len(source), global_batch=8, rank=0, world_size=1, seed=0,
                         first_step=0, last_step=num_steps)  # fmt: skip
    shown = {index for keys in stream for _, index in keys}
    return {hash_file(source.path(index)).tobytes() for index in shown}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_knows_what_its_weights_have_seen_and_no_more(images, tmp_path, workers):
    """Two workers load batches ahead; those were not trained on."""
    changes = {"DATA__NUM_WORKERS": workers}
    run = tiny.trainer(images, tmp_path, [], **changes)
    assert run.train([tiny.StopAfter(2)]) == 143
    first = rows_in(tmp_path, STOPPED.format(3))
    assert first == rows_shown(images, 3) and len(first) == 24
    summary = ckpt.verify_manifest(tmp_path / STOPPED.format(3))[KEY]
    assert summary == {"num_known": 24, "num_images": 34, "lacks": ""}
    assert tiny.trainer(images, tmp_path, [], **changes).train([tiny.StopAfter(5)]) == 143
    # The two images that the first epoch lacked came in the second, or not yet.
    assert rows_in(tmp_path, STOPPED.format(6)) == rows_shown(images, 6) > first
    assert tiny.trainer(images, tmp_path, [], **changes).train() == 0
    assert rows_in(tmp_path) == rows_shown(images, 12)


def test_hashing_changes_nothing_that_is_learned(images, tmp_path, monkeypatch):
    assert tiny.trainer(images, tmp_path / "with", []).train() == 0
    build = Trainer.__init__.__globals__["build_loader"]
    monkeypatch.setitem(
        Trainer.__init__.__globals__, "build_loader",
        lambda *args, seen, **options: build(*args, **options),
    )  # fmt: skip
    assert tiny.trainer(images, tmp_path / "without", []).train() == 0
    assert not rows_in(tmp_path / "without")
    digests = [tiny.state_digest(content_of(tmp_path / name)) for name in ("with", "without")]
    assert digests[0] == digests[1]


def _two_ranks(rank, images, folder):
    def trainer():
        return Trainer(
            tiny.config(), find_images(images), folder, ProcessInfo(rank, 2, rank,
            torch.device("cpu")), resume=True, say=lambda line: None,
        )  # fmt: skip

    assert trainer().train([tiny.StopAfter(2)] if rank == 1 else []) == 143
    run = trainer()
    known = int(run.seen._known.sum())
    run.train()
    return [known, len(run.seen), len(run.seen._rows)]


def test_ranks_put_together_what_each_has_seen(images, tmp_path):
    first, second = in_processes(_two_ranks, tmp_path, images, tmp_path / "run")
    shown = rows_shown(images, 12)
    assert first == [24, len(shown), 34] and second == [24, len(shown), 0]  # rows: rank 0 alone
    assert rows_in(tmp_path / "run") == shown


def forget(path):
    """Make the checkpoint one of before images were recorded."""
    content = ckpt.read_torch_file(path)
    extra = content["extra"]
    del extra[KEY], extra["excluded"]
    ckpt.save_checkpoint(path, content, step=extra["step"], config_digest=extra["config_digest"],
                         code_digest=extra["code_digest"], changes=[])  # fmt: skip


def test_an_older_checkpoint_leaves_a_gap_that_closes_once_all_were_seen_again(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    make_images(folder, 32)  # every epoch shows all
    assert tiny.trainer(folder, tmp_path / "run", []).train([tiny.StopAfter(2)]) == 143
    path = tmp_path / "run" / STOPPED.format(3)
    forget(path)
    assert "an older version" in record_in(ckpt.read_torch_file(path), "x").reason
    assert tiny.trainer(folder, tmp_path / "run", []).train([tiny.StopAfter(4)]) == 143
    record = record_in(content_of(tmp_path / "run", STOPPED.format(5)), "x")
    assert 0 < len(record.rows) < 32 and record.lacks.startswith("the first 3 steps were not")
    assert tiny.trainer(folder, tmp_path / "run", []).train() == 0
    assert len(rows_in(tmp_path / "run")) == 32


def test_another_list_of_images_keeps_those_of_before(images, tmp_path):
    assert tiny.trainer(images, tmp_path / "run", []).train([tiny.StopAfter(4)]) == 143
    before = rows_in(tmp_path / "run", STOPPED.format(5))
    other = tmp_path / "other"
    other.mkdir()
    rng = np.random.default_rng(9)
    for number in range(40):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(other / f"{number:02d}.png")
    run = tiny.trainer(other, tmp_path / "run", [], allow_change=["data"])
    assert run.train() == 0
    after = rows_in(tmp_path / "run")
    assert before < after and len(after - before) == 40 - 40 % 8


def test_a_checkpoint_without_extra_has_unknown_images_for_good(images, tmp_path):
    process = ProcessInfo(0, 1, 0, torch.device("cpu"))
    seen = SeenImages(3, process)
    seen.restore("theirs.pth.tar", None, step=400, same_images=False)
    seen.add(400, Seen(np.arange(3), np.ones((3, ROW_BYTES), np.uint8)))
    seen.gather(401)
    assert seen.lacks == "the first 400 steps were not recorded (theirs.pth.tar)"
    assert isinstance(record_in({"state_dict": {}}, "x"), Unknown)


def test_a_run_that_begins_with_weights_has_their_images_too(images, tmp_path):
    before = ImageRecord(np.arange(2 * ROW_BYTES, dtype=np.uint8).reshape(2, ROW_BYTES))
    run = tiny.trainer(images, tmp_path / "known", [])
    run.seen.begin_with(before)
    assert run.train([tiny.StopAfter(2)]) == 143
    rows = rows_in(tmp_path / "known", STOPPED.format(3))
    assert rows == rows_shown(images, 3) | {row.tobytes() for row in before.rows}
    run = tiny.trainer(images, tmp_path / "unknown", [])
    run.seen.begin_with(Unknown("theirs.pth has no record of its images"))
    assert run.train([tiny.StopAfter(2)]) == 143
    record = record_in(content_of(tmp_path / "unknown", STOPPED.format(3)), "x")
    assert len(record.rows) == 24
    assert record.lacks == (
        "those of the weights it began with are unknown (theirs.pth has no record of its images)"
    )


def test_a_damaged_record_is_refused(images, tmp_path):
    run = tiny.trainer(images, tmp_path, [])
    whole = run.seen.state()
    for key, value in {
        "format": 2, "rows": torch.zeros(3, 5, dtype=torch.uint8), "earlier": None,
        "known": torch.zeros(5, dtype=torch.uint8) + 255,
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match="its record of images is damaged"):
            run.seen.restore("x.pth.tar", {**whole, key: value}, step=3, same_images=True)
    with pytest.raises(CheckpointError, match="x.pth.tar: its record of images is damaged"):
        record_in({"extra": {KEY: {**whole, "rows": [1]}}}, "x.pth.tar")


def test_its_size_is_counted_with_the_checkpoint(images, tmp_path):
    run = tiny.trainer(images, tmp_path, [])
    assert run.seen.max_bytes == 34 * ROW_BYTES + 4


def test_an_export_and_a_conversion_of_it_carry_the_record_on(images, tmp_path):
    changes = {"MODEL__ARCH": "resnet50", "MODEL__STEM": "imagenet", "TRAIN__EPOCHS": 1}
    assert tiny.trainer(images, tmp_path / "run", [], **changes).train() == 0
    exported, converted = tmp_path / "r50.safetensors", tmp_path / "d2.pth"
    export_backbone(tmp_path / "run", exported, form="safetensors")
    convert_checkpoint(exported, converted)
    wanted = {row.tobytes() for row in record_in(content_of(tmp_path / "run", FIRST), "x").rows}
    for path in (exported, converted):
        assert {row.tobytes() for row in record_beside(path).rows} == wanted
    # Weights of a source without a record, under the same name: the old one is gone.
    content = content_of(tmp_path / "run", FIRST)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "theirs.pth")
    convert_checkpoint(tmp_path / "theirs.pth", converted)
    assert not (tmp_path / "d2.pth.images.safetensors").exists()
    assert "is not a checkpoint of tools/pretrain.py" in record_beside(converted).reason
