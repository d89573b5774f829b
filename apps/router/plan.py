"""Which replica answers a request: a function of what is known of them, without any I/O."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ANSWER = 64
"""Work of an answer, in words of a prompt: many are decoded at a time, and none is waited for."""

OVER = 1.25
"""Most work of a replica, over the mean."""

COUNTED = 2
"""What is computed keeps others waiting as well: it counts so often."""

LEAST_SHARE = 0.1
"""Prompts that are not alike share so much by their common words."""

Reason = Literal["donor", "moved", "load"]


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica as one request finds it.

    Attributes:
        replica: its number.
        share: of the prompt's n-grams, how many its best earlier request has, 0 to 1.
        ahead: words of prompts in flight there that are still to be computed.
        work: of requests in flight there, in words: those, and answers.
        seconds: measured, for a word computed.
    """

    replica: int
    share: float = 0.0
    ahead: float = 0.0
    work: float = 0.0
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes.

    Attributes:
        replica: its number.
        reason: "donor": to who has most of it; "moved": its donor's replica has too much to do;
            "load": nobody has anything alike.
        computed: words of the prompt that are expected to be computed there.
    """

    replica: int
    reason: Reason
    computed: float

    @property
    def work(self) -> float:
        """In flight, until the answer ends."""
        return self.computed + ANSWER


def choose(length: int, replicas: Sequence[Standing], draw: random.Random) -> Choice:
    """The replica with the first token soonest: saved tokens against waiting.

    Until the first token, the prompts ahead are computed, and what of this one is not shared, which
    counts twice because others wait for it too. A replica takes no request that would leave it with
    more than 1.25 times the mean work and a whole request like this one: the least busy one always
    may. Among equals, and for a prompt that nobody knows, the idler of two drawn ones is taken.

    Args:
        length: of the prompt, in words.
        replicas: those that may be asked.
        draw: decides between equals.

    Raises:
        ValueError: there are none.
    """
    if not replicas:
        raise ValueError("there is no replica to choose from")
    best = max(r.share for r in replicas)
    most = OVER * sum(r.work for r in replicas) / len(replicas) + length + ANSWER
    fitting = [r for r in replicas if r.work + _computed(length, r) + ANSWER <= most]

    def cost(replica: Standing) -> float:
        return (replica.ahead + COUNTED * _computed(length, replica)) * replica.seconds

    def load(replica: Standing) -> float:
        return (replica.work + _computed(length, replica)) * replica.seconds

    equal = fitting or [min(replicas, key=lambda r: r.work)]  # none: by rounding only
    if best >= LEAST_SHARE:
        least = min(map(cost, equal))
        equal = [r for r in equal if cost(r) <= least * (1 + 1e-9)]
    chosen = min(draw.sample(equal, min(2, len(equal))), key=load)
    if best < LEAST_SHARE:
        reason: Reason = "load"
    else:
        reason = "donor" if chosen.share == best else "moved"
    return Choice(chosen.replica, reason, _computed(length, chosen))


def _computed(length: int, replica: Standing) -> float:
    return length * (1 - replica.share) if replica.share >= LEAST_SHARE else float(length)
