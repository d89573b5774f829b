"""The tasks: one file each, and one line each in the table below."""

from __future__ import annotations

from kvshare_mm.apps.bench.tasks.base import Item, Task
from kvshare_mm.apps.bench.tasks.exams import Exams
from kvshare_mm.apps.bench.tasks.letters import Letters
from kvshare_mm.apps.bench.tasks.multidoc import MultiDocument
from kvshare_mm.apps.bench.tasks.reports import Reports
from kvshare_mm.apps.bench.tasks.summaries import Summaries
from kvshare_mm.apps.bench.tasks.translation import Translation
from kvshare_mm.errors import ConfigError

__all__ = ["TASKS", "Item", "Task", "task_named"]

TASKS: dict[str, Task] = {
    t.name: t for t in (Translation(), Summaries(), MultiDocument(), Reports(), Exams(), Letters())
}


def task_named(name: str) -> Task:
    """A task by name. Raises ConfigError."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is none of {', '.join(TASKS)}")
    return TASKS[name]
