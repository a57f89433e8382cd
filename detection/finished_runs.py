"""What is finished already among the runs that are to be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detection.engines.base import Run
from detection.run_folder import examine_folder
from detection.trial_results import left_out


def finished_runs(runs: Sequence[Run], say: Callable[[str], None]) -> list[dict | None]:
    """The results of the runs to which there is nothing left to train, None for the others. One of
    before a change that --allow-change permits is marked as left out of the mean.

    Args:
        runs: of one job, which differ in folder and seed.
        say: receives lines for the user.
    Raises: CheckpointError, before anything is written, if a folder holds another run.
    """
    results, changed, allowed = [], set(), runs[0].changes.allowed
    for run in runs:
        state = examine_folder(run.output_dir, run.identity, run.seed, allowed)
        changed.update(state.differences)
        for line in state.lines:
            say(line)
        result = state.result
        if result and state.differences:
            names = ", ".join(state.differences)
            result = left_out(result, f"it was finished before this change of {names}")
        results.append(result)
    for name in sorted(set(allowed) - changed):
        say(f"--allow-change: {name} did not change at this start")
    return results
