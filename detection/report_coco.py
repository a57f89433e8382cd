"""COCO's scores of boxes and masks over trials, a table for results.md."""

from __future__ import annotations

from detection.evaluation.coco_ap import METRICS
from detection.report_classes import spread_in_words

_ROWS = {"bbox": "boxes", "segm": "masks"}


def coco_table(results: dict) -> str:
    """Markdown; "" for trials that were not scored by COCO's metric."""
    scored = [trial["coco"] for trial in results["trials"] if trial.get("coco")]
    if not scored:
        return ""
    lines = [f"| | {' | '.join(METRICS)} |", f"|---{'|---' * len(METRICS)}|"]
    for task, name in _ROWS.items():
        if all(task in tasks for tasks in scored):
            cells = (spread_in_words([tasks[task][m] for tasks in scored]) for m in METRICS)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    heading = (
        "COCO's metric over the same trials; s, m, l: objects of an area under 32², to 96² and "
        "over 96² pixels."
    )
    return "\n".join([heading, "", *lines])
