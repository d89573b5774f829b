"""Where media are decoded: in this process, or in one that can be ended."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from kvshare_mm.errors import InvalidRequestError, KVShareError
from kvshare_mm.modalities.picture_file import Picture, load_picture
from kvshare_mm.modalities.sound_file import Sound, load_sound

QUICK_S = 1.0  # what takes no longer may be decoded anywhere again


class DecoderFailedError(KVShareError):
    """No process that decodes media can be started."""


class Decoder(Protocol):
    """Decodes files as `load_picture` and `load_sound` do, with the same results and errors.

    Attributes:
        counters: what was counted, by name.
    """

    counters: Counter[str]

    def picture(self, content: bytes, where: str, max_pixels: int) -> Picture: ...

    def sound(self, content: bytes, where: str, rate: int, max_s: float) -> Sound: ...

    def close(self) -> None: ...


class InProcess:
    """Decodes where it is called."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()

    def picture(self, content: bytes, where: str, max_pixels: int) -> Picture:
        return load_picture(content, where, max_pixels)

    def sound(self, content: bytes, where: str, rate: int, max_s: float) -> Sound:
        return load_sound(content, where, rate, max_s)

    def close(self) -> None:
        """Nothing is open."""


class Asker:
    """Somebody for whom media are decoded, and who may go away meanwhile. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gone = False
        self._stop: Callable[[], None] | None = None

    @property
    def gone(self) -> bool:
        return self._gone

    def leave(self) -> None:
        """End what is done for this one."""
        with self._lock:
            self._gone = True
            if self._stop is not None:
                self._stop()

    @contextmanager
    def served(self, stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `stop` is called when the asker leaves.

        Raises:
            InvalidRequestError: nobody waits for it any more.
        """
        with self._lock:
            if self._gone:
                raise InvalidRequestError("nobody waits for this any more")
            self._stop = stop
        try:
            yield
        finally:
            with self._lock:
                self._stop = None


asker: ContextVar[Asker | None] = ContextVar("asker", default=None)
