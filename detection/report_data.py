"""What a report says of the data of a run and of what changed during it."""

from __future__ import annotations

_PARTS = (("train", "training"), ("test", "test"))


def data_lines(results: dict) -> list[str]:
    """List items for results.md, from the content of results.json."""
    lines = []
    data = results.get("data")
    if data:
        parts = [
            f"{name} {data[part]['images']} images, {data[part]['boxes']} boxes "
            f"({data[part]['digest']})"
            for part, name in _PARTS
        ]
        lines.append(f"- data: {'; '.join(parts)}")
    finished = [(k, t) for k, t in enumerate(results["trials"]) if t["status"] == "finished"]
    unknown = [str(k) for k, trial in finished if not trial.get("data")]
    if unknown:
        lines.append(
            f"- the data of trial {', '.join(unknown)} are unknown: older than their fingerprints"
        )
    for k, trial in finished:
        for change in trial.get("changes", ()):
            lines.append(f"- WARNING: trial {k}: {_in_words(change)}")
    return lines


def _in_words(change: dict) -> str:
    before, now = change["before"], change["now"]
    if isinstance(before, dict):  # of the data
        before, now = (
            ", ".join(f"{name} {side[part]['digest']}" for part, name in _PARTS)
            for side in (before, now)
        )
    return f"{change['name']} changed from {before} to {now} after iteration {change['step']}"
