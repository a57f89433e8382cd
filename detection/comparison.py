"""Comparison of two sets of trials: differences of means with confidence intervals.

The interval is over trials: it tells how the difference would vary with the seed, not with the
data. Where both runs have trials of the same seeds, these are compared pair by pair.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from detection.config import get_defaults
from detection.data.fingerprint import data_differences, read_lists
from detection.report import confidence_interval_of_difference
from detection.report_classes import per_class_values
from detection.run_folder import CONFIG_FILE, changed_keys
from detection.trial_results import SCORES, summarise
from moco.cfgnode import flatten, to_dict
from moco.errors import CheckpointError, ConfigError
from moco.training.checkpoint import read_json

RESULTS_FILE = "results.json"
_NEEDED = ("dataset", "metric", "engine", "config_digest", "weights", "versions", "trials")


@dataclass(frozen=True)
class TrialRun:
    """A folder of trials: the content of its results.json and of its config.yaml (None without)."""

    folder: Path
    results: dict
    config: dict | None

    @property
    def finished(self) -> list[dict]:
        return [trial for trial in self.results["trials"] if trial["status"] == "finished"]

    @property
    def first_finished(self) -> int:
        states = [trial["status"] for trial in self.results["trials"]]
        return states.index("finished") if "finished" in states else 0


@dataclass(frozen=True)
class Method:
    """How the interval is computed, and why so."""

    name: str  # "paired t" or "Welch"
    why: str
    order: tuple[tuple[int, int], ...]  # pairs of positions among the finished trials


def read_run(folder: str | os.PathLike) -> TrialRun:
    """Read a folder that `train_net.py --trials` wrote.

    Raises: CheckpointError where results.json is missing, damaged or of something else.
    """
    folder = Path(folder).expanduser()
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: does not exist; give the OUTPUT_DIR of a run of train_net.py --trials N"
        )
    results = read_json(path)
    missing = [name for name in _NEEDED if not isinstance(results, dict) or name not in results]
    if missing:
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing)}; it is not the file that --trials writes"
        )
    return TrialRun(folder, results, _read_config(folder / CONFIG_FILE))


def _read_config(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: is no valid YAML ({reason}); restore it") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no mapping of keys; restore it")
    return config


def compare(a: TrialRun, b: TrialRun, level: float = 0.95) -> dict:
    """Differences a - b of mean AP50, AP, AP75 and of the classes' means, with intervals.

    Args:
        level: probability that an interval covers the difference, between 0 and 1.
    Returns: JSON-ready: "a", "b" (see `_described`), "level", "method", "why", "scores" {score:
        entry}, "per_class" {class: {score: entry}} and "warnings". An entry is {"a", "b",
        "difference", "low", "high"} in percent, None where a trial's score is undefined.
    Raises: ConfigError for runs of different data, metric or classes, or with fewer than 2
        finished trials.
    """
    _refuse(a, b)
    if not 0 < level < 1:
        raise ConfigError(f"level {level}: allowed is a number between 0 and 1, e.g. 0.95")
    method = choose_method(
        [trial["seed"] for trial in a.finished], [trial["seed"] for trial in b.finished]
    )
    overall = {
        score: _entry(*([t[score] for t in run.finished] for run in (a, b)), method, level)
        for score in SCORES
    }
    by_class_a, by_class_b = per_class_values(a.results), per_class_values(b.results)
    per_class = {
        name: {
            score: _entry(values[score], by_class_b[name][score], method, level) for score in SCORES
        }
        for name, values in by_class_a.items()
    }
    return {
        "a": _described(a),
        "b": _described(b),
        "level": level,
        "method": method.name,
        "why": method.why,
        "scores": overall,
        "per_class": per_class,
        "warnings": _warnings(a, b),
    }


def choose_method(seeds_a: Sequence[int], seeds_b: Sequence[int]) -> Method:
    """Pairs where each seed of one run is one of the other's, else Welch's interval."""
    if len(set(seeds_a)) == len(seeds_a) and sorted(seeds_a) == sorted(seeds_b):
        order = tuple((k, list(seeds_b).index(seed)) for k, seed in enumerate(seeds_a))
        why = (
            f"both runs finished the same seeds ({_listed(seeds_a)}), and trials of one seed may "
            "share draws, so they are no independent samples and are compared in pairs"
        )
        return Method("paired t", why, order)
    why = (
        f"the finished trials have different seeds ({_listed(seeds_a)} and {_listed(seeds_b)}), "
        "so they are independent samples, with a variance each"
    )
    return Method("Welch", why, ())


def paired_interval(differences: Sequence[float], level: float) -> tuple[float, float]:
    """Student's interval of the mean of n paired differences, n - 1 degrees of freedom."""
    from scipy import stats  # a second of every command's start otherwise

    mean, count = statistics.fmean(differences), len(differences)
    margin = stats.t.ppf((1 + level) / 2, count - 1) * statistics.stdev(differences)
    margin /= math.sqrt(count)
    return mean - margin, mean + margin


def _refuse(a: TrialRun, b: TrialRun) -> None:
    where = f"{a.folder} and {b.folder}"
    if a.folder.resolve() == b.folder.resolve():
        raise ConfigError(f"{where}: are one run; give two")
    known = [run.results.get("data") for run in (a, b)]
    if all(known):
        _refuse_other_test_data(where, a, b)
    for name in ("metric",) if all(known) else ("dataset", "metric"):
        if a.results[name] != b.results[name]:
            raise ConfigError(
                f"{where}: have {name} {a.results[name]!r} and {b.results[name]!r}; only runs "
                "scored on the same data with the same metric are compared"
            )
    for run in (a, b):
        if len(run.finished) < 2:
            raise ConfigError(
                f"{run.folder}: has {len(run.finished)} finished trials; at least 2 are needed "
                "for an interval; run more with --trials"
            )
    names_a, names_b = (list(per_class_values(run.results)) for run in (a, b))
    if sorted(names_a) != sorted(names_b):
        raise ConfigError(
            f"{where}: have classes {names_a} and {names_b}; only runs of the same classes are "
            "compared"
        )


def _refuse_other_test_data(where: str, a: TrialRun, b: TrialRun) -> None:
    (then, then_folder), (now, now_folder) = (
        (run.results["data"], run.folder / f"trial_{run.first_finished}") for run in (a, b)
    )
    if then["test"] == now["test"]:
        return
    words = data_differences(
        {**now, "test": then["test"]}, now, then_folder, read_lists(now_folder, now)
    )
    raise ConfigError(
        f"{where}: were scored on other data (first and second run: {words}); only runs scored on "
        "the same test data are compared"
    )


def _data_warnings(a: TrialRun, b: TrialRun) -> list[str]:
    """Of what is not known to be equal."""
    unknown = [run for run in (a, b) if not run.results.get("data")]
    if unknown:
        return [
            f"{run.folder}: is older than fingerprints of data, so whether both runs are of the "
            "same data is known by the name only"
            for run in unknown
        ]
    then, now = a.results["data"]["train"], b.results["data"]["train"]
    if then == now:
        return []
    sizes = [f"{part['images']} images, {part['boxes']} boxes" for part in (then, now)]
    return [f"training data differ: {' | '.join(sizes)}"]


def _entry(
    a: Sequence[float | None], b: Sequence[float | None], method: Method, level: float
) -> dict[str, float | None]:
    if None in (*a, *b):
        return dict.fromkeys(("a", "b", "difference", "low", "high"))
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    if method.order:
        low, high = paired_interval([a[i] - b[j] for i, j in method.order], level)
    else:
        low, high = confidence_interval_of_difference(a, b, level)
    return {"a": mean_a, "b": mean_b, "difference": mean_a - mean_b, "low": low, "high": high}


def _described(run: TrialRun) -> dict:
    results = run.results
    summary = summarise(results["trials"])
    return {
        "folder": str(run.folder),
        **{name: results[name] for name in ("dataset", "metric", "engine", "versions")},
        "config_digest": results["config_digest"],
        "weights": results["weights"],
        "num_finished": summary["num_finished"],
        "num_failed": summary["num_failed"],
        "seeds": [trial["seed"] for trial in run.finished],
        "std": summary["std"],
    }


def _warnings(a: TrialRun, b: TrialRun) -> list[str]:
    """What differs between the runs beside the weights, the engine and the seeds."""
    warnings = _data_warnings(a, b)
    for run in (a, b):
        num_left_out = run.results.get("num_left_out", 0)
        if num_left_out:
            warnings.append(
                f"{run.folder}: {num_left_out} trials of other data or settings are left out"
            )
        failed = summarise(run.results["trials"])["num_failed"]
        if failed:
            warnings.append(f"{run.folder}: {failed} failed trials are left out")
        if run.config is None:
            warnings.append(
                f"{run.folder}: has no {CONFIG_FILE}, so the configurations cannot be compared"
            )
    if a.config is not None and b.config is not None:
        # A key that is younger than a run had its default there.
        defaults = flatten(to_dict(get_defaults()))
        changed = changed_keys(*({**defaults, **flatten(run.config)} for run in (a, b)))
        warnings += [f"{key} differs: {old} | {new}" for key, (old, new) in changed.items()]
    ranks = [sorted({trial.get("num_processes", 1) for trial in run.finished}) for run in (a, b)]
    if ranks[0] != ranks[1]:
        warnings.append(f"number of processes differs: {ranks[0]} | {ranks[1]}")
    return warnings


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in sorted(seeds))
