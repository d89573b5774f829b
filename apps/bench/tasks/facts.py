"""Facts in answers: numbers and names as whole words, and where they must not come from."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from kvshare_mm.apps.bench.tasks.base import Item, Task


def states(answer: str, fact: str) -> bool:
    """Whether `answer` says `fact` as a whole word or number: 4.1 is not said by 14.1 or 4.15."""
    pattern = rf"(?<![\w.]){re.escape(fact)}(?!\w|\.\d)"
    return re.search(pattern, answer, re.IGNORECASE) is not None


def leaks(answer: str, full_answer: str, item: Item) -> bool:
    """Whether an answer states the donor's fact where full recompute states the new one."""
    return (
        item.stale is not None
        and states(full_answer, item.references[0])
        and states(answer, item.stale)
    )


class FactTask(Task):
    """Questions for one changed fact, made by seed; an answer is right if it states it and nothing
    stale."""

    metric: ClassVar[str] = "exact match"
    needs_data: ClassVar[bool] = False

    @abstractmethod
    def item(self, i: int, rng: random.Random) -> Item:
        """The next question."""

    def items(self, path: Path | None, limit: int, seed: int) -> list[Item]:
        rng = random.Random(seed)
        return [self.item(i, rng) for i in range(limit)]

    def statistics(self, answer: str, item: Item) -> list[float]:
        right = states(answer, item.references[0])
        stale = item.stale is not None and states(answer, item.stale)
        return [float(right and not stale)]
