"""R20: retention of 3 while the newest checkpoints are corrupt."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
from pretrain_runs import make_images

from moco.training import checkpoint as ckpt
from moco.training.retention import Retention

pytestmark = pytest.mark.faults
KEPT, EPOCHS = 3, 9  # of one step each
DAMAGES = ("a bit", "a cut", "no manifest", "a cut manifest", "another file's manifest")


def damage(path: Path, what: str, rng: random.Random) -> None:
    manifest = ckpt.manifest_path(path)
    content = bytearray(path.read_bytes())
    if what == "a bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif what == "a cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif what == "no manifest":
        manifest.unlink()
    elif what == "a cut manifest":
        manifest.write_bytes(manifest.read_bytes()[: rng.randrange(40)])
    else:
        text = manifest.read_text()
        digest = ckpt.verify_manifest(path)["sha256"]
        manifest.write_text(text.replace(digest, digest[::-1]))


class Ledger:
    """Knows, without any manifest, which checkpoints of a run are whole; watches each removal."""

    def __init__(self, monkeypatch):
        self.whole: dict[Path, tuple[int, bytes]] = {}
        self.pruned, self.wrong = 0, []
        save, remove, prune = ckpt.save_checkpoint, ckpt.remove_checkpoint, Retention.prune

        def saving(path, content, **fields):
            save(path, content, **fields)
            self.whole[path] = (fields["step"], path.read_bytes())

        def removing(path):
            """A whole one may go only once as many newer whole ones are there as are kept."""
            if path in self.whole:
                step = self.whole.pop(path)[0]
                if sum(newer > step for newer in self.steps()) < KEPT:
                    self.wrong.append(f"{path.name} removed, left are {self.steps()}")
            remove(path)

        def pruning(retention, written=None):
            most = len(self.steps())
            prune(retention, written)
            self.pruned += 1
            verified = [p for p in ckpt.checkpoint_files(retention.run_dir) if self._verifies(p)]
            if sorted(verified) != sorted(self.whole) or len(verified) != min(most, KEPT):
                self.wrong.append(f"verified are {sorted(p.name for p in verified)} of {most}")

        monkeypatch.setattr(ckpt, "save_checkpoint", saving)
        monkeypatch.setattr(ckpt, "remove_checkpoint", removing)
        monkeypatch.setattr(Retention, "prune", pruning)

    def steps(self) -> list[int]:
        """Of the whole ones that are on the disk as they were written."""
        return sorted(s for p, (s, data) in self.whole.items()
                      if p.exists() and p.read_bytes() == data)  # fmt: skip

    def newest(self) -> Path | None:
        return max(self.whole, key=lambda path: self.whole[path], default=None)

    def _verifies(self, path: Path) -> bool:
        try:
            ckpt.verify_manifest(path)
        except ckpt.CheckpointError:
            return False
        return True


class Corrupt:
    """After an epoch's checkpoint, perhaps damages it, and perhaps the newest whole one again."""

    def __init__(self, ledger: Ledger, rng: random.Random):
        self.ledger, self.rng, self.num = ledger, rng, 0

    def on_step(self, record) -> None:
        pass

    def on_epoch(self, record) -> None:
        while len(self.ledger.whole) > 1 and self.rng.random() < 0.4:
            path = self.ledger.newest()
            damage(path, self.rng.choice(DAMAGES), self.rng)
            del self.ledger.whole[path]
            self.num += 1


def run_with_damage(images: Path, folder: Path, seed: int) -> tuple[list[str], int]:
    """Train in two starts. Returns: what was wrong with the retention, and the damages done."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        ledger = Ledger(monkeypatch)
        corrupt = Corrupt(ledger, rng)
        options = {"CHECKPOINT__KEEP_LAST": KEPT, "TRAIN__EPOCHS": EPOCHS}
        stop = tiny.StopAfter(rng.randint(3, 7))
        assert tiny.trainer(images, folder, [], **options).train([corrupt, stop]) == 143
        newest = ledger.newest()
        run = tiny.trainer(images, folder, [], **options)
        if run.first_step != ledger.whole[newest][0]:
            ledger.wrong.append(f"went on at {run.first_step}, the last good is {newest.name}")
        assert run.train([corrupt]) == 0
        assert ledger.pruned >= EPOCHS
    return ledger.wrong, corrupt.num


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    return make_images(tmp_path / "images", num=8)


def test_three_that_verify_are_kept_and_the_last_good_never_goes(images, tmp_path, observed, long):
    seeds, good, damages = range(200 if long else 12), 0, 0
    for seed in seeds:
        wrong, num = run_with_damage(images, tmp_path / str(seed), seed)
        assert not wrong, (seed, wrong)
        good, damages = good + (not wrong), damages + num
    assert damages > 2 * len(seeds)
    observed("R20", good, len(seeds))


@pytest.mark.parametrize("broken", ["counts without verifying", "keeps by number alone"])
def test_control_retention_that_trusts_names(images, tmp_path, monkeypatch, observed, broken):
    if broken == "counts without verifying":
        monkeypatch.setattr(Retention, "_verifies", lambda self, path: True)
    else:

        def by_number(self, written=None):
            for _, path in self._newest_first()[self.keep_last :]:
                ckpt.remove_checkpoint(path)

        monkeypatch.setattr(Retention, "prune", by_number)
    found = [run_with_damage(images, tmp_path / str(seed), seed)[0] for seed in range(4)]
    observed("R20", int(any(found)), 1, control=True)  # 12 of 12 would not be seen
