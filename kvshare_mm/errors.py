"""Errors a caller can act on. Everything else is a bug.

A cache failure is never raised to a request: it is a miss, counted with its reason
(see `KVUnavailableError`, which the engine catches).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KVShareError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(KVShareError, ValueError):
    """An option has a value that cannot work; raised before anything is loaded."""


class ModelLoadError(KVShareError):
    """The model, tokenizer or embedder could not be found or loaded."""


class InvalidRequestError(KVShareError, ValueError):
    """A request cannot be served as it stands; raised where it enters.

    Attributes:
        field: name of the offending request field, for API error bodies.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(KVShareError):
    """The waiting queue is at its limit; the caller should retry later."""


class EngineClosedError(KVShareError):
    """The engine was closed, or its worker died, before the request was done."""


class ModelOutputError(KVShareError):
    """The model's output is not a number, so no token follows from it; the request has ended."""


class NotFiniteError(KVShareError, ValueError):
    """What was given to the store holds NaN or an infinity; nothing of it was stored."""


class StoreError(KVShareError):
    """The store folder cannot be used (not writable, not a folder)."""


class KVUnavailableError(KVShareError):
    """A donor's KV cannot be read; the engine counts `reason` and computes in full.

    Attributes:
        reason: short machine-readable cause: "evicted", "corrupt", "io_error", "wrong_namespace",
            "newer_format".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, to stand behind an error's words; "" if nothing is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
