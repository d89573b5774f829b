"""A server behind a router: where it is, whether it answers, what it has to do."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence

import httpcore2

from kvshare_mm.apps.router.plan import ANSWER, Choice, Standing
from kvshare_mm.errors import ConfigError

logger = logging.getLogger(__name__)

_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?(?:/v1)?/?")
_CHECK_TIMEOUT_S = 2.0
# Until something was measured, a word takes as long everywhere.
_FIRST_GUESS_S = 1e-3
_LEARNING = 0.1
_HALF_LIFE_S = 60.0
# Envoy's outlier detection: consecutive_5xx and base_ejection_time.
_FAILURES_IN_A_ROW = 5
_REST_S = 30.0


class Replica:
    """One server. For one event loop.

    Args:
        number: its name to clients, who need not know its address.
        url: ``http(s)://host[:port]``, with ``/v1`` behind it or without.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the URL has anything else.
    """

    def __init__(self, number: int, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        parts = _URL.fullmatch(url)
        port = int(parts[3] or 0) if parts else 0
        if parts is None or port >= 1 << 16:
            raise ConfigError(
                f"--replicas: {url!r} is not like http://10.0.0.1:8000: scheme, host and port"
            )
        self.number = number
        self.netloc = parts[2] + (f":{port}" if port else "")
        self.origin = f"{parts[1]}://{self.netloc}"
        self.healthy = False
        self.in_flight = 0
        self._scheme, self._host = parts[1].encode(), parts[2].strip("[]").encode()
        self._port = port or None
        self._clock = clock
        self._ahead = 0.0
        self._work = 0.0
        self._seconds: float | None = None
        self._measured_at = clock()
        self._failures = 0
        self._rests_until = clock()

    def url(self, target: str) -> httpcore2.URL:
        """Of a path with its query, percent-encoded, on this server and no other."""
        return httpcore2.URL(
            scheme=self._scheme, host=self._host, port=self._port, target=target.encode("ascii")
        )

    def standing(self, share: float = 0.0, typical_s: float = _FIRST_GUESS_S) -> Standing:
        """As a request finds it.

        What was measured long ago counts little against the `typical_s` for a word: who was slow
        once would get no request that tells otherwise.
        """
        own = typical_s if self._seconds is None else self._seconds
        trust = 0.5 ** ((self._clock() - self._measured_at) / _HALF_LIFE_S)
        seconds = typical_s + (own - typical_s) * trust
        return Standing(self.number, share, self._ahead, self._work, seconds)

    @property
    def seconds_per_word(self) -> float | None:
        """As measured; None: not yet."""
        return self._seconds

    @property
    def rests(self) -> bool:
        """Whether it gets nothing while another can be asked, however healthy it says it is."""
        return self._clock() < self._rests_until

    def answered(self, status: int) -> None:
        """It answered a request; or it did not, and the status is a proxy's word for that.

        Who fails several in a row is left alone for a while: an error is made sooner than an
        answer, so it would get more requests than the others. Then it is tried with one.
        """
        self._failures = self._failures + 1 if status >= 500 else 0
        if self._failures >= _FAILURES_IN_A_ROW and not self.rests:
            self._rests_until = self._clock() + _REST_S
            logger.warning(
                "replica %d, %s, failed %d requests in a row, the last with status %d: it gets "
                "none for %.0f s",
                self.number,
                self.origin,
                self._failures,
                status,
                _REST_S,
            )

    def came_back(self) -> None:
        """It answers checks again: what it failed before, another process may have failed."""
        self.healthy, self._failures, self._rests_until = True, 0, self._clock()

    def begin(self, choice: Choice) -> Flight:
        return Flight(self, choice, self._ahead)

    def learn(self, seconds: float, words: float) -> None:
        """So many words of prompts and answers took so long."""
        measured = seconds / words
        before = measured if self._seconds is None else self._seconds
        self._seconds = before + _LEARNING * (measured - before)
        self._measured_at = self._clock()

    def add(self, prompt: float = 0.0, answer: float = 0.0, requests: int = 0) -> None:
        """More is in flight, or less: words to be computed, and of answers."""
        self.in_flight += requests
        # From nothing on it is counted anew: sums of floats drift, below nothing too.
        self._ahead = max(0.0, self._ahead + prompt) if self.in_flight else 0.0
        self._work = max(0.0, self._work + prompt + answer) if self.in_flight else 0.0


class Flight:
    """A request at a replica: `first` when its answer begins, `end` when it is over."""

    def __init__(self, replica: Replica, choice: Choice, ahead: float) -> None:
        self._replica = replica
        self._ahead = ahead
        self._computed = choice.computed
        self.answered = False
        replica.add(self._computed, ANSWER, 1)

    def first(self, seconds: float, whole: bool) -> None:
        """The first byte came after so many seconds; with `whole` the answer is complete by now."""
        self.answered = True
        if self._computed >= 1:  # else it says nothing of prompts
            self._replica.learn(seconds, self._ahead + self._computed + ANSWER * whole)
        self._replica.add(-self._computed)
        self._computed = 0.0

    def end(self) -> None:
        self._replica.add(-self._computed, -ANSWER, -1)


def typical_seconds(replicas: Sequence[Replica]) -> float:
    """Of a word, where a replica has not been measured."""
    measured = [s for r in replicas if (s := r.seconds_per_word) is not None]
    return sum(measured) / len(measured) if measured else _FIRST_GUESS_S


async def check(replica: Replica, pool: httpcore2.AsyncConnectionPool) -> None:
    """Ask a replica whether it can answer requests."""
    why = ""
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            async with pool.stream(
                "GET", replica.url("/health"), headers=[(b"host", replica.netloc.encode())]
            ) as reply:
                why = "" if reply.status == 200 else f"status {reply.status}"
    except Exception as error:  # whatever it is, requests would meet it too
        why = str(error) or type(error).__name__
    if replica.healthy == bool(why):
        if why:
            replica.healthy = False
        else:
            replica.came_back()
        level = logging.WARNING if why else logging.INFO
        said = f"does not answer: {why}" if why else "answers"
        logger.log(level, "replica %d, %s, %s", replica.number, replica.origin, said)
