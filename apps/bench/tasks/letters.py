"""Letters of other customers, asked for the order number: is it copied whole?"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from kvshare_mm.apps.bench.tasks.base import Item
from kvshare_mm.apps.bench.tasks.facts import FactTask
from kvshare_mm.apps.desk.shop import Letter

_NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
_QUESTIONS = (
    "What is my order number?",
    "Which order is this about? Name its number.",
    "Please repeat my order number to me.",
)


@dataclass(frozen=True)
class Letters(FactTask):
    """Letters to a shop made by seed, that differ in name and order number.

    The first token's divergence says little here: what goes wrong are the number's later digits,
    that are copied from positions behind the edit.
    """

    name: ClassVar[str] = "letters"
    about: ClassVar[str] = "letters to a shop: the order number asked for is not the donor's"
    chat: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 16

    def item(self, i: int, rng: random.Random) -> Item:
        names = rng.sample(_NAMES, 2)
        numbers = rng.sample(range(1_000, 10_000), 2)
        question = rng.choice(_QUESTIONS)
        donor, target = (
            str(Letter(name, str(number), question).messages()[0]["content"])
            for name, number in zip(names, numbers, strict=True)
        )
        return Item(str(i), donor, target, (str(numbers[1]),), str(numbers[0]))
