"""What evaluations write down: how often answers were right, by topic, with how many questions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def by_topic(results: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """Share of right answers and number of questions of each topic, and over all."""
    right: dict[str, list[bool]] = {}
    for topic, ok in results:
        right.setdefault(topic, []).append(ok)
    every = [ok for values in right.values() for ok in values]
    return {
        "all": {"right": _share(every), "questions": len(every)},
        **{topic: {"right": _share(ok), "questions": len(ok)} for topic, ok in right.items()},
    }


def write(folder: Path, figures: dict[str, Any]) -> None:
    """``figures.json`` in a model's folder."""
    text = json.dumps(figures, indent=2) + "\n"
    (folder / "figures.json").write_text(text, encoding="utf-8")


def table(figures: dict[str, Any], columns: dict[str, str]) -> str:
    """A Markdown table of several measurements: ``columns`` maps a heading to a key."""
    topics = dict.fromkeys(topic for key in columns.values() for topic in figures[key])
    lines = [
        f"| topic | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for topic in topics:
        cells = [figures[key].get(topic) for key in columns.values()]
        shown = ["" if cell is None else f"{cell['right']:.3f}" for cell in cells]
        lines.append(f"| {topic} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _share(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)
