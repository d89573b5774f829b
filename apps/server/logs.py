"""Logging with request ids, as text or as one JSON object a line.

Much of what is logged was chosen by clients: paths, texts in errors. None of it may look like a
line of its own, or steer the terminal that shows it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="-")


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def printable(text: str) -> str:
    """Text on one line: line ends, escape codes, bidi controls and the like are spelt out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormatter(logging.Formatter):
    """One line a record; those of a traceback begin with a bar."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s [%(request_id)s] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        lines = _lines(super().formatException(ei))
        return "\n".join(f"  | {line}" for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request id and `extra["fields"]`."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
            "request_id": getattr(record, "request_id", "-"),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["error"] = "\n".join(_lines(self.formatException(record.exc_info)))
        return json.dumps(entry)


def configure(as_json: bool, level: int) -> None:
    """Send all logs to standard error, in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_WithRequestId())
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for told in ("kvshare_mm.apps.server", "kvshare_mm.apps.router", "kvshare_mm.assemble"):
        logging.getLogger(told).setLevel(min(level, logging.INFO))
    for chatty in ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "httpcore2"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))


def _lines(text: str) -> list[str]:
    return [printable(line) for line in text.split("\n")]
