"""A run on packed images is the run on their folder, bit for bit."""

from __future__ import annotations

import signal

import pytest
import tiny

from moco.data.images import find_images
from moco.data.shard_writer import PackOptions, pack_images
from moco.data.subset import SubsetSource
from moco.errors import CheckpointError, ConfigError
from moco.evaluation.monitor import build_knn_monitor
from moco.training import checkpoint as ckpt
from moco.training.identity import data_digest
from moco.training.trainer import Trainer

LAST = "checkpoint_0002.pth.tar"


def pack(folder, out, **options):
    """Both splits, as tools/pack_images.py does."""
    for split in ("train", "test"):
        source = find_images(folder / split)
        (out / split).mkdir(parents=True)
        order = sorted(range(len(source)), key=lambda i: (i * 7) % len(source))
        pack_images(source, out / split, PackOptions(shard_bytes=30_000, **options), order)
    return out


def trainer(images, folder, *, resume=False, allow_change=(), **changes):
    return Trainer(
        tiny.config(**changes), find_images(images), folder, tiny.alone(), resume=resume,
        allow_change=allow_change, say=lambda line: None,
    )  # fmt: skip


def run(images, folder, **changes) -> tuple[str, str, list[float]]:
    """Digest of everything learned, of the images' names, and the kNN accuracies."""
    run = trainer(images, folder, **changes)
    accuracies = []
    monitor = build_knn_monitor(
        run.cfg, str(images), run.source, run.process, say=lambda line: None
    )

    def evaluate(encoder, stop):
        accuracies.append(monitor(encoder)["knn_top1"])
        return {}

    assert run.train(evaluate=evaluate) == 0
    content = ckpt.read_torch_file(folder / LAST)
    return tiny.state_digest(content), content["extra"]["data_digest"], accuracies


@pytest.fixture
def packed(image_folder, tmp_path):
    return pack(image_folder, tmp_path / "packed")


def test_the_run_is_the_folders(image_folder, packed, tmp_path):
    expected = run(image_folder, tmp_path / "a")
    assert len(find_images(packed).index.shards) == 4
    assert run(packed, tmp_path / "b", DATA__NUM_WORKERS=2) == expected
    smaller = pack(image_folder, tmp_path / "smaller", resize=16)  # negative control
    digest, names, _ = run(smaller, tmp_path / "c")
    assert digest != expected[0] and names == expected[1]


def test_a_run_moves_from_its_folder_to_a_pack(image_folder, packed, tmp_path):
    """Stopped on one, it continues on the other: to a resumed run they are the same images."""
    expected, _, _ = run(image_folder, tmp_path / "a")

    assert trainer(image_folder, tmp_path / "b").train([tiny.StopAfter(5)]) == 128 + signal.SIGTERM
    resumed = trainer(packed, tmp_path / "b", resume=True)
    assert resumed.first_step == 6 and resumed.train() == 0
    assert tiny.state_digest(ckpt.read_torch_file(tmp_path / "b" / LAST)) == expected


BLOCKS = {"DATA__ORDER": "blocks", "DATA__BLOCK_SIZE": 4, "DATA__BLOCKS_IN_FLIGHT": 3}


def test_block_order_resumes_exactly_and_needs_no_worker(packed, tmp_path):
    uniform, _, _ = run(packed, tmp_path / "u")
    expected, _, _ = run(packed, tmp_path / "a", **BLOCKS)
    assert expected != uniform
    assert run(packed, tmp_path / "b", DATA__NUM_WORKERS=2, **BLOCKS)[0] == expected

    code = trainer(packed, tmp_path / "c", **BLOCKS).train([tiny.StopAfter(5)])
    assert code == 128 + signal.SIGTERM
    assert trainer(packed, tmp_path / "c", resume=True, **BLOCKS).train() == 0
    assert tiny.state_digest(ckpt.read_torch_file(tmp_path / "c" / LAST)) == expected


def test_block_order_of_single_files_is_refused(image_folder, tmp_path):
    with pytest.raises(ConfigError, match="DATA.ORDER blocks: .* tools/pack_images.py"):
        trainer(image_folder, tmp_path / "a", **BLOCKS)


def test_a_bad_image_is_replaced_and_the_run_resumes_exactly(image_folder, tmp_path):
    (image_folder / "train" / "a" / "03.png").write_bytes(b"text")
    changes = {"DATA__MAX_BAD_FRACTION": 0.05, "KNN__PERIOD": 0}
    whole = trainer(image_folder, tmp_path / "a", **changes)
    assert whole.train() == 0
    expected = tiny.state_digest(ckpt.read_torch_file(tmp_path / "a" / LAST))
    assert len((tmp_path / "a" / "bad_images.rank0.jsonl").read_text().splitlines()) == 1

    assert trainer(image_folder, tmp_path / "b", **changes).train([tiny.StopAfter(5)]) != 0
    # The share may be changed between: it is no part of what makes a run the same.
    changes["DATA__MAX_BAD_FRACTION"] = 0.5
    again = trainer(image_folder, tmp_path / "b", resume=True, DATA__NUM_WORKERS=1, **changes)
    assert again.train() == 0
    assert tiny.state_digest(ckpt.read_torch_file(tmp_path / "b" / LAST)) == expected


CONTENTS = {"DATA__FINGERPRINT": "contents"}


def started(images, folder, **changes):
    assert trainer(images, folder, **changes).train([tiny.StopAfter(5)]) == 143


def test_contents_are_compared_where_asked(image_folder, packed, tmp_path):
    """Names stay, pixels change: the default does not see it, DATA.FINGERPRINT contents does."""
    other = pack(image_folder, tmp_path / "other", resize=16)
    started(packed, tmp_path / "names")
    assert trainer(other, tmp_path / "names", resume=True).first_step == 6
    started(packed, tmp_path / "contents", **CONTENTS)
    assert trainer(packed, tmp_path / "contents", resume=True, **CONTENTS).first_step == 6
    found = "images of the same names, but other contents .*--allow-change data"
    with pytest.raises(CheckpointError, match=found):
        trainer(other, tmp_path / "contents", resume=True, **CONTENTS)
    with pytest.raises(ConfigError, match="contents: .* is a folder of single files"):
        trainer(image_folder, tmp_path / "contents", resume=True, **CONTENTS)


def test_the_fingerprint_itself_may_change_where_allowed(packed, image_folder, tmp_path):
    """Then what both sides know is compared: the names."""
    started(packed, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"\(DATA.FINGERPRINT 'names' -> 'contents'\)"):
        trainer(packed, tmp_path / "run", resume=True, **CONTENTS)
    allowed = {"resume": True, "allow_change": ["DATA.FINGERPRINT"]}
    assert trainer(packed, tmp_path / "run", **allowed, **CONTENTS).first_step == 6
    (image_folder / "train" / "a" / "00.png").rename(image_folder / "train" / "a" / "new.png")
    renamed = pack(image_folder, tmp_path / "renamed")
    with pytest.raises(CheckpointError, match="made on another set of images"):
        trainer(renamed, tmp_path / "run", **allowed, **CONTENTS)


def test_the_digest_of_names_is_what_it_was_and_contents_follow(packed, image_folder):
    folder, images = find_images(image_folder), find_images(packed)
    names, contents = tiny.config(), tiny.config(**CONTENTS)
    assert data_digest(names, folder) == data_digest(names, images)
    assert data_digest(contents, images).startswith(data_digest(names, images) + ":")
    # A part of a pack has the hashes of its own images.
    part = SubsetSource(images, [3, 1])
    assert part.content_hashes.tolist() == [images.content_hashes[i].tolist() for i in (3, 1)]
    other_order = data_digest(contents, SubsetSource(images, [1, 3]))
    assert data_digest(contents, part) != other_order
