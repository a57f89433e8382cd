"""A comparison (`detection.comparison.compare`) as Markdown."""

from __future__ import annotations

from detection.trial_results import SCORES


def comparison_text(comparison: dict) -> str:
    """What was compared, the warnings, the table of means and the table by class."""
    first, second = comparison["a"], comparison["b"]
    parts = [
        f"# {first['folder']} (A) and {second['folder']} (B) on {first['dataset']}",
        f"Metric: {first['metric']}. Percent, mean ± standard deviation over trials (n - 1).",
        "\n".join(_origin(letter, run) for letter, run in (("A", first), ("B", second))),
        "\n".join(f"- WARNING: {line}" for line in comparison["warnings"]),
        _overall_table(comparison),
        f"Interval: {comparison['method']}, since {comparison['why']}. It covers the variation "
        "over seeds, not that over data.",
        _class_table(comparison),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(letter: str, run: dict) -> str:
    weights = run["weights"]
    start = "random initialisation"
    if weights["path"]:
        start = f"`{weights['path']}` (sha256 {weights['sha256'][:16]})"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    seeds = ", ".join(map(str, run["seeds"]))
    return (
        f"- {letter}: {start}; engine {run['engine']} ({versions}); config digest "
        f"{run['config_digest']}; {run['num_finished']} trials, seeds {seeds}"
    )


def _overall_table(comparison: dict) -> str:
    lines = [_header(""), "|---|---|---|---|"]
    for letter, key in (("A", "a"), ("B", "b")):
        cells = [_mean(comparison["scores"][s][key], comparison[key]["std"][s]) for s in SCORES]
        lines.append(f"| {letter} | {' | '.join(cells)} |")
    cells = [_difference(comparison["scores"][score]) for score in SCORES]
    lines.append(f"| A - B [{100 * comparison['level']:g} % interval] | {' | '.join(cells)} |")
    return "\n".join(lines)


def _class_table(comparison: dict) -> str:
    per_class = comparison["per_class"]
    if not per_class:
        return ""
    percent = 100 * comparison["level"]
    lines = [
        f"A - B by class [{percent:g} % interval]. Of many intervals some miss 0 by chance: about "
        f"{100 - percent:g} in 100.",
        "",
        _header("class"),
        "|---|---|---|---|",
    ]
    for name, entries in per_class.items():
        cells = " | ".join(_difference(entries[score]) for score in SCORES)
        lines.append(f"| {name.replace('|', '/')} | {cells} |")
    return "\n".join(lines)


def _header(first: str) -> str:
    return f"| {first} | {' | '.join(SCORES)} |"


def _mean(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "undefined"
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _difference(entry: dict) -> str:
    if entry["difference"] is None:
        return "undefined"
    return f"{entry['difference']:+.2f} [{entry['low']:+.2f}, {entry['high']:+.2f}]"
