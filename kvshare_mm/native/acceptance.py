"""How often drafted tokens are right, by what was drafted from, and how many are worth drafting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

# What rows add to a decode step, in steps of one: each of the first four, and of the others all of
# them once and each (see `models.few_rows`). Measured on a CPU; a GPU's rows cost less.
_ROW, _FEW, _MANY, _MANY_ROW = 0.12, 4, 0.6, 0.05
# Where nothing has been drafted yet: how often a token is right, as if so many had been tried.
_BEFORE = {"donor": 0.75, "sure": 0.6, "unsure": 0.35}
_TRIED = 4.0
# Weight of what was known before a draft: within an answer, and within a family.
_ANSWER, _FAMILY = 0.8, 0.95
# What is not drafted is taken for a little better each time, so that it is tried again.
_CURIOUS = 1 / 256
_MOST_FAMILIES = 4096


def step_cost(rows: int) -> float:
    """How long a decode step of so many rows takes, in steps of one."""
    few = 1 + _ROW * (min(rows, _FEW) - 1)
    return few if rows <= _FEW else few + _MANY + _MANY_ROW * (rows - _FEW)


@dataclass(slots=True)
class Rate:
    """Tokens that were right, of those that were tried: drafted, up to the first wrong one."""

    right: float
    tried: float = _TRIED

    @property
    def chance(self) -> float:
        """That a drafted token is right, if those before it are."""
        return min(1.0, self.right / self.tried)

    def learn(self, drafted: int, right: int, memory: float) -> None:
        """Of a draft of so many tokens so many were right."""
        self.right = memory * self.right + right
        self.tried = memory * self.tried + min(drafted, right + 1)

    def length(self, most: int, batch: int = 1) -> int:
        """How many tokens to draft; 0: it does not pay.

        Args:
            batch: answers of the step, whose tokens all wait for the draft's rows.
        """
        best, worth, right, likely = 0, 0.0, 0.0, 1.0
        for length in range(1, most + 1):
            likely *= self.chance
            right += likely
            gain = right - batch * (step_cost(batch + length) / step_cost(batch) - 1)
            if gain > worth:
                best, worth = length, gain
        if not best and most:
            self.right += self.tried * _CURIOUS
        return best


class Acceptance:
    """The rates of one answer, which begin as its family's and are learned by both.

    Args:
        family: of each kind of draft, see `_BEFORE`; shared by the family's answers.
    """

    def __init__(self, family: Mapping[str, Rate] | None = None) -> None:
        self._family = family or _new()
        self._own = {
            kind: replace(rate, right=rate.chance * _TRIED, tried=_TRIED)
            for kind, rate in self._family.items()
        }

    def length(self, kind: str, most: int, batch: int = 1) -> int:
        """How many tokens of a kind to draft, see `Rate.length`."""
        return self._own[kind].length(most, batch)

    def learn(self, kind: str, drafted: int, right: int) -> None:
        """Of a draft of so many tokens so many were right."""
        self._own[kind].learn(drafted, right, _ANSWER)
        self._family[kind].learn(drafted, right, _FAMILY)


class Families:
    """Rates by namespace and family of donors; those not seen for longest are forgotten."""

    def __init__(self) -> None:
        self._rates: OrderedDict[tuple[str, str], dict[str, Rate]] = OrderedDict()

    def acceptance(self, ns: str, family: str | None) -> Acceptance:
        """For a new answer; without a family: that of prompts that are like no other."""
        rates = self._rates.setdefault((ns, family or ""), _new())
        self._rates.move_to_end((ns, family or ""))
        if len(self._rates) > _MOST_FAMILIES:
            self._rates.popitem(last=False)
        return Acceptance(rates)


def _new() -> dict[str, Rate]:
    return {kind: Rate(chance * _TRIED) for kind, chance in _BEFORE.items()}
