"""Which checkpoints of a run folder are kept, what killed writers left there, and free space."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from moco.errors import CheckpointError
from moco.training import checkpoint as ckpt

# What `write_atomic` calls the unfinished files of a run folder; its suffix is tempfile's.
_LEFTOVER = re.compile(
    r"^\.(checkpoint_(\d{4,}|step_\d+)\.pth\.tar(\.manifest\.json)?|config\.yaml|log\.jsonl"
    r"|excluded\.json)\.[a-z0-9_]{8}$"
)


class Retention:
    """Keeps the newest `keep_last` verified checkpoints and those at multiples of `milestone`.

    Checkpoints written at a stop (`checkpoint_step_*`) go as soon as a newer one verifies and are
    not counted. Nothing goes unless a newer one verifies, so the last verified one never does.
    What does not verify is not counted either; it goes with its age.

    Args:
        milestone: in steps; 0 keeps none for good.
    """

    def __init__(self, run_dir: str | os.PathLike, *, keep_last: int, milestone: int):
        self.run_dir = Path(run_dir)
        self.keep_last = keep_last
        self.milestone = milestone
        self._verified: dict[Path, tuple] = {}  # what a file looked like when its hash was right

    def prune(self, written: Path | None = None) -> None:
        """Remove what is no longer kept.

        Args:
            written: the checkpoint just written, whose hash is known from writing.
        """
        if written is not None:
            self._verified[written] = _look(written)
        newest, num_kept = None, 0
        for step, path in self._newest_first():
            at_stop = bool(ckpt.STEP_FILE.match(path.name))
            may_go = newest is not None and step < newest
            if may_go and (at_stop or num_kept == self.keep_last):
                if at_stop or not self._is_milestone(step):
                    ckpt.remove_checkpoint(path)
                    self._verified.pop(path, None)
            elif self._verifies(path):
                newest = step if newest is None else newest
                num_kept += not at_stop

    def sweep(self) -> list[str]:
        """Remove what a killed writer left; call it while no other job writes to the folder.

        Unfinished temporary files, and manifests whose checkpoint is gone. A file without manifest
        stays: its run writes it anew when it gets there, and it may be the user's.

        Returns: the names of what was removed.
        """
        if not self.run_dir.is_dir():
            return []
        removed = []
        for path in sorted(self.run_dir.iterdir()):
            checkpoint = path.with_name(path.name.removesuffix(ckpt.MANIFEST_SUFFIX))
            orphan = (
                checkpoint != path
                and _step_in_name(checkpoint.name) is not None
                and not checkpoint.exists()
            )
            if orphan or _LEFTOVER.match(path.name):
                path.unlink(missing_ok=True)
                removed.append(path.name)
        return removed

    def check_space(self, *, checkpoint_bytes: int, steps: Sequence[int]) -> None:
        """Raise CheckpointError where the run's checkpoints would not fit on its disk.

        Args:
            checkpoint_bytes: of one checkpoint.
            steps: those after which one will be written.
        """
        present = sum(not self._is_milestone(step) for step, _ in self._newest_first())
        milestones = sum(map(self._is_milestone, steps))
        # One more than are kept: the newest is written before the oldest goes.
        most = max(0, self.keep_last + 1 - present) + milestones
        count = min(len(steps), max(1, most))
        needed, free = count * checkpoint_bytes, ckpt.free_bytes(self.run_dir)
        if needed > free:
            raise CheckpointError(
                f"{self.run_dir}: the checkpoints to come need about {needed} bytes ({count} of "
                f"{checkpoint_bytes}), {free} are free there; free space, give another "
                "--output-dir, or lower CHECKPOINT.KEEP_LAST or raise CHECKPOINT.MILESTONE"
            )

    def _newest_first(self) -> list[tuple[int, Path]]:
        """(step, path) of checkpoints, by their manifests; a stop's without one by its name."""
        found = []
        for path in ckpt.checkpoint_files(self.run_dir):
            step = ckpt.step_in_manifest(path)
            if step is None and ckpt.STEP_FILE.match(path.name):
                step = _step_in_name(path.name)
            if step is not None:
                found.append((step, path))
        return sorted(found, reverse=True)

    def _is_milestone(self, step: int) -> bool:
        return self.milestone > 0 and step % self.milestone == 0

    def _verifies(self, path: Path) -> bool:
        if self._verified.get(path) == _look(path):
            return True
        try:
            ckpt.verify_manifest(path)
        except CheckpointError:
            return False
        self._verified[path] = _look(path)
        return True


def _look(path: Path) -> tuple:
    """What changes when a checkpoint or its manifest is touched, without reading them."""
    stats = (p.stat() for p in (path, ckpt.manifest_path(path)) if p.exists())
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)


def _step_in_name(name: str) -> int | None:
    match = ckpt.EPOCH_FILE.match(name) or ckpt.STEP_FILE.match(name)
    return int(match.group(1)) if match else None
