"""What `--allow-change` lets differ when a run continues, and the record of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

from moco.cfgnode import did_you_mean, flatten
from moco.config import DIGEST_EXCLUDE, get_defaults
from moco.errors import ConfigError
from moco.training.identity import ACCUMULATION, DATA, WEIGHTS


def check_names(
    names: Sequence[str],
    known: Collection[str],
    *,
    free: Sequence[str] = (),
    fixed: Mapping[str, str] | None = None,
    example: str,
) -> None:
    """Raise ConfigError for a name that `--allow-change` cannot let differ.

    Args:
        known: the configuration's keys, in full.
        free: keys, and sections of keys, that change no number.
        fixed: name -> why it cannot change, and what to do.
        example: a key, for the message.
    """
    fixed = fixed or {}
    for name in names:
        if name in fixed:
            raise ConfigError(f"--allow-change: {name} {fixed[name]}")
        if name not in (*known, DATA):
            raise ConfigError(
                f"--allow-change: unknown name {name!r}{did_you_mean(name, (*known, DATA))}; "
                f"allowed: a configuration key in full, such as {example}, or {DATA}"
            )
        if f"{name}.".startswith(tuple(f"{key}." for key in free)):
            raise ConfigError(
                f"--allow-change: {name} changes no number and may always differ; leave it out"
            )


def pretraining_changes(allowed: Sequence[str] = ()) -> Changes:
    """Raises: ConfigError for a name that cannot be allowed in pretraining."""
    fixed = {
        ACCUMULATION: "goes with the number of processes; give --elastic",
        WEIGHTS: "is read at the start of a run alone; give what it was started with, or start "
        "another run with another --output-dir",
    }
    known = flatten(get_defaults())
    check_names(allowed, known, free=DIGEST_EXCLUDE, fixed=fixed, example="TRAIN.LR")
    return Changes(allowed)


@dataclass(frozen=True)
class Change:
    """name: a configuration key, or "data"; before, now: its values (of "data": digests);
    step: finished steps as it was made."""

    name: str
    before: object
    now: object
    step: int


class Changes:
    """The changes of a run, of all its starts.

    Args:
        allowed: names that may differ at this start, see `check_names`.
        unit: what is counted in `Change.step`, for the lines.
    """

    def __init__(self, allowed: Sequence[str] = (), *, unit: str = "step"):
        self.allowed, self._unit = tuple(allowed), unit
        self.before: list[dict] = []  # of earlier starts, from the checkpoint
        self.new: list[dict] = []

    def add(
        self, step: int, before: list[dict], differences: Mapping[str, tuple[object, object]]
    ) -> list[str]:
        """Note what a checkpoint brings along and what differs from it now. Returns lines of it."""
        self.before = list(before)
        made = [Change(n, *differences[n], step) for n in self.allowed if n in differences]
        self.new = [asdict(change) for change in made]
        return [
            f"--allow-change: {change.name} {change.before!r} -> {change.now!r} from {self._unit} "
            f"{step} on"
            for change in made
        ]

    def say_unused(self, say: Callable[[str], None]) -> None:
        for name in sorted(set(self.allowed) - {change["name"] for change in self.new}):
            say(f"--allow-change: {name} did not change at this start")

    def all(self) -> list[dict]:
        """Plain values, for the checkpoint and its manifest; oldest first."""
        return [*self.before, *self.new]
