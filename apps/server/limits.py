"""What one API key may use in a minute: token buckets, in memory.

Limits stand at a key, beside its tenant in the file of keys. How much a request will use is known
when it is over: before, it is reserved by its size, as OpenAI does (a token every four characters,
`max_tokens` of answer), then by what was read and answered; what it did not use is given back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.keys import Limits

_MINUTE_S = 60.0
_LEAST_WAIT_S = 1.0  # until a place of a key whose requests all run may be free


class Bucket:
    """A minute's worth fits in and flows in within a minute. It can be overdrawn, and refills."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.capacity = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._stamp = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        flown = (now - self._stamp) * self.capacity / _MINUTE_S
        self._level, self._stamp = min(self.capacity, self._level + flown), now
        return self._level

    def wait(self, amount: float) -> float:
        """Seconds until so much can be taken; of more than fits in, until it is full."""
        return self.filled_in(min(amount, self.capacity))

    def filled_in(self, level: float) -> float:
        """Seconds until it holds so much."""
        return max(0.0, level - self.level) * _MINUTE_S / self.capacity

    def take(self, amount: float) -> None:
        """Less than nothing gives back."""
        self._level = min(self.capacity, self.level - amount)


class Meter:
    """One key's use, against its limits. For one event loop.

    Args:
        limits: of the key.
        clock: seconds, monotonic.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.running = 0
        self.change(limits)

    def change(self, limits: Limits) -> None:
        """Other limits begin anew, with what runs."""
        self.limits = limits
        self._requests, self._prompt, self._output = (
            None if rate is None else Bucket(rate, self._clock)
            for rate in (
                limits.requests_per_minute,
                limits.prompt_tokens_per_minute,
                limits.output_tokens_per_minute,
            )
        )

    def begin(self) -> None:
        """A request comes; `end` when it is over. Raises ApiError 429."""
        most = self.limits.concurrent_requests
        if most is not None and self.running >= most:
            raise _refused(f"{most} requests at a time", _LEAST_WAIT_S)
        self._check(self._requests, 1, "requests a minute")
        if self._requests is not None:
            self._requests.take(1)
        self.running += 1

    def end(self) -> None:
        self.running -= 1

    def reserve(self, prompt: int, output: int) -> Bill:
        """Take what a request may use. Raises ApiError 429."""
        self.check_prompt(prompt)
        self._check(self._output, output, "output tokens a minute")
        self.take(prompt, output)
        return Bill(self, prompt, output)

    def check_prompt(self, tokens: int) -> None:
        """Raises ApiError 429: there is not so much left."""
        self._check(self._prompt, tokens, "prompt tokens a minute")

    def take(self, prompt: int, output: int) -> None:
        for bucket, amount in ((self._prompt, prompt), (self._output, output)):
            if bucket is not None:
                bucket.take(amount)

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's: what is left, and when all of it is there again. `tokens` are those of the
        prompt or of the answer, of which less is left."""
        told = {"requests": self._requests}
        tokens = [b for b in (self._prompt, self._output) if b is not None]
        told["tokens"] = min(tokens, key=lambda b: b.level / b.capacity, default=None)
        found = {}
        for name, bucket in told.items():
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.filled_in(bucket.capacity):.3f}s"
        return found

    @staticmethod
    def _check(bucket: Bucket | None, amount: int, name: str) -> None:
        if bucket is not None and (wait := bucket.wait(amount)) > 0:
            raise _refused(f"{bucket.capacity} {name}", wait)


class Bill:
    """What one request has reserved, until it is known what it used.

    Args:
        meter: of its key; None: nothing is limited.
    """

    def __init__(self, meter: Meter | None = None, prompt: int = 0, output: int = 0) -> None:
        self._meter, self._prompt, self._output = meter, prompt, output
        self._made = 0

    def read(self, prompt: int) -> None:
        """Its prompts have so many tokens as far as they are read. Raises ApiError 429."""
        if self._meter is not None and prompt > self._prompt:
            self._take(-self._prompt, 0)
            self._meter.check_prompt(prompt)
            self._take(prompt, 0)

    def answered(self, output: int) -> None:
        """Its answers have so many tokens by now: who names no `max_tokens` pays as they grow."""
        self._made = output
        self._take(0, max(0, output - self._output))

    def settle(self, prompt: int | None = None) -> None:
        """It is over, well or not: what it did not use is given back.

        Args:
            prompt: tokens of its prompts; None: unknown, as many as were reserved or read.
        """
        used = self._prompt if prompt is None else prompt
        self._take(used - self._prompt, self._made - self._output)
        self._meter = None

    def _take(self, prompt: int, output: int) -> None:
        if self._meter is not None:
            self._meter.take(prompt, output)
            self._prompt += prompt
            self._output += output


class Meters:
    """The meters of all keys that have limits. A file of keys that is read again resets nothing.

    >>> Meters().of("", None) is None
    True
    """

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}

    def of(self, key: str, limits: Limits | None) -> Meter | None:
        """The meter of a key (its hash); None: it has no limits. New limits begin anew."""
        if limits is None:
            return None
        meter = self._meters.get(key)
        if meter is None:
            meter = self._meters[key] = Meter(limits)
        elif meter.limits != limits:
            meter.change(limits)
        return meter


def _refused(limit: str, wait: float) -> ApiError:
    return ApiError(
        429,
        f"this key may use {limit}; try again in {wait:.1f} s",
        code="rate_limit_exceeded",
        retry_after=wait,
    )
