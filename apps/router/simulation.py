"""What a way of routing gains: requests through replicas that each have a queue and a cache.

A replica computes one prompt after the other, in the order in which they come, and keeps a donor of
each family of alike requests: the last one, whole; families used longest ago go first. Answers are
not simulated: they are decoded many at a time.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.apps.router.plan import COUNTED, LEAST_SHARE, OVER

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests in the order of their arrival; arrays of one length.

    Attributes:
        at: seconds, ascending.
        tokens: of the prompt, at least 1.
        family: requests of one are alike; 0 .. families - 1.
        shared: tokens of the prompt that an earlier one of its family has.
        start: requests with the same number begin alike, which is what prefix hashes see.
        user: who asks.
    """

    at: Floats
    tokens: Ints
    family: Ints
    shared: Ints
    start: Ints
    user: Ints


class Queues:
    """When each replica has computed what it was sent."""

    def __init__(self, replicas: int, tokens_per_s: float) -> None:
        self.free_at: Floats = np.zeros(replicas)
        self._tokens_per_s = tokens_per_s

    def ahead(self, now: float) -> Floats:
        """Tokens that are still to be computed, ``[replicas]``."""
        return np.maximum(self.free_at - now, 0.0) * self._tokens_per_s

    def add(self, replica: int, now: float, tokens: float) -> float:
        """Seconds until a prompt that comes now has its first token."""
        end = max(now, float(self.free_at[replica])) + tokens / self._tokens_per_s
        self.free_at[replica] = end
        return end - now


class Donors:
    """What one replica keeps: of each family the tokens of a donor, within a budget of tokens."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._total = 0

    def replace(self, family: int, tokens: int) -> int:
        """A request is the donor of its family now. Returns the tokens of the one before; or 0."""
        before = self._kept.pop(family, 0)
        self._kept[family] = tokens
        self._total += tokens - before
        while self._total > self._budget:
            self._total -= self._kept.popitem(last=False)[1]
        return before


Route = Callable[[int], int]
"""The replica of the request of this number."""
Policy = Callable[[Requests, Queues, np.random.Generator], Route]


def _round_robin(requests: Requests, queues: Queues, _: np.random.Generator) -> Route:
    return lambda i: i % len(queues.free_at)


def _places(
    keys: Ints, queues: Queues, rng: np.random.Generator, count: int
) -> Callable[[int], list[int]]:
    """So many replicas that the key of a request hashes to."""
    drawn = rng.integers(len(queues.free_at), size=(int(keys.max()) + 1, count))
    return lambda i: drawn[keys[i]].tolist()


def _by(key: str) -> Policy:
    """The one replica that a key hashes to."""

    def policy(requests: Requests, queues: Queues, rng: np.random.Generator) -> Route:
        places = _places(getattr(requests, key), queues, rng, 1)
        return lambda i: places(i)[0]

    return policy


def _two_choices(requests: Requests, queues: Queues, rng: np.random.Generator) -> Route:
    """The idler of two replicas that the beginning hashes to, unless both have too much to do."""
    places = _places(requests.start, queues, rng, 2)

    def route(i: int) -> int:
        ahead = queues.ahead(requests.at[i])
        best = min(places(i), key=ahead.__getitem__)
        if ahead[best] > OVER * ahead.mean() + requests.tokens[i]:
            best = int(ahead.argmin())
        return best

    return route


def _kvshare(requests: Requests, queues: Queues, rng: np.random.Generator) -> Route:
    """`plan.choose`, with what was sent to whom; what a replica evicted it is not told."""
    known = np.zeros((int(requests.family.max()) + 1, len(queues.free_at)), np.float32)
    draw = random.Random(int(rng.integers(1 << 32)))
    at, tokens, families, shared = (x.item for x in _columns(requests))

    def route(i: int) -> int:
        donors, length = known[families(i)], tokens(i)
        chosen = pick(length, np.minimum(donors, shared(i)), queues.ahead(at(i)), draw)
        donors[chosen] = length
        return chosen

    return route


def pick(length: float, shared: NDArray[Any], ahead: Floats, draw: random.Random) -> int:
    """`plan.choose` over arrays: the index of the replica.

    Args:
        length: of the prompt.
        shared: ``[replicas]``, how much of it each is known to have.
        ahead: ``[replicas]``, what is to be computed there; there is no other work.
        draw: decides between equals.
    """
    computed = length - np.where(shared >= LEAST_SHARE * length, shared, 0)
    load = ahead + computed
    fitting = load <= OVER * ahead.mean() + length
    if not fitting.any():  # by rounding only
        return int(ahead.argmin())
    if computed.min() < length:
        cost = np.where(fitting, load + (COUNTED - 1) * computed, np.inf)
        fitting = cost <= cost.min() * (1 + 1e-9)
    equal = np.flatnonzero(fitting)
    drawn = draw.sample(range(len(equal)), min(2, len(equal)))
    return int(min((equal[d] for d in drawn), key=load.__getitem__))


POLICIES: dict[str, Policy] = {
    "round robin": _round_robin,
    "by user": _by("user"),
    "by prefix": _by("start"),
    "two choices": _two_choices,
    "kvshare": _kvshare,
}


def _columns(requests: Requests) -> tuple[NDArray[Any], ...]:
    return requests.at, requests.tokens, requests.family, requests.shared


def _rows(requests: Requests) -> Iterator[tuple[float, int, int, int]]:
    """Python's numbers take ten times the room of arrays: not all at once."""
    for start in range(0, len(requests.at), _AT_ONCE):
        part = (column[start : start + _AT_ONCE].tolist() for column in _columns(requests))
        yield from zip(*part, strict=True)


def simulate(
    requests: Requests,
    policy: str,
    replicas: int,
    tokens_per_s: float,
    cache_tokens: float,
    seed: int = 0,
) -> dict[str, float]:
    """Send requests through replicas.

    Args:
        requests: at least one.
        policy: one of `POLICIES`.
        replicas: how many.
        tokens_per_s: that each computes of prompts.
        cache_tokens: that each can keep.
        seed: of what is drawn.

    Returns:
        Seconds to the first token (``ttft_mean_s``, ``ttft_p50_s``, ``ttft_p99_s``), the mean wait
        before a prompt is computed (``wait_mean_s``), the share of prompt tokens that are
        ``computed``, and the ``busiest`` replica's computed tokens over the mean.
    """
    queues = Queues(replicas, tokens_per_s)
    caches = [Donors(cache_tokens) for _ in range(replicas)]
    route = POLICIES[policy](requests, queues, np.random.default_rng(seed))
    work = [0] * replicas
    ttft = np.empty(len(requests.at))
    for i, (now, tokens, family, shared) in enumerate(_rows(requests)):
        replica = route(i)
        # The last position is always computed.
        reused = min(caches[replica].replace(family, tokens), shared, tokens - 1)
        work[replica] += tokens - reused
        ttft[i] = queues.add(replica, now, tokens - reused)
    p50, p99 = np.percentile(ttft, (50, 99))
    return {
        "ttft_mean_s": float(ttft.mean()),
        "ttft_p50_s": float(p50),
        "ttft_p99_s": float(p99),
        "wait_mean_s": float(ttft.mean()) - sum(work) / tokens_per_s / len(ttft),
        "computed": sum(work) / float(requests.tokens.sum()),
        "busiest": max(work) * replicas / sum(work),
    }
