"""Why vLLM did not start, told by the process where it happened.

vLLM's engine runs in processes of its own; the one that starts them hears no more than that one has
ended ("see root cause above"). They all load our plugin, though, and log what ends them.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Names the file to the processes: they get nothing else of ours before they start working.
VARIABLE = "KVSHARE_START_FAILURES"
_LOGGER = "vllm"
_LONGEST = 2000
_one_start = threading.Lock()


@contextmanager
def noted() -> Iterator[Callable[[], str | None]]:
    """While it lasts, processes that are started note what ends them.

    Yields:
        What the first of them noted, or None.
    """
    with _one_start:
        descriptor, name = tempfile.mkstemp(prefix="kvshare-", suffix=".failures")
        os.close(descriptor)
        file = Path(name)

        def first() -> str | None:
            return file.read_text(encoding="utf-8").partition("\0")[0].strip() or None

        os.environ[VARIABLE] = name
        handler = _Notes(file)
        logging.getLogger(_LOGGER).addHandler(handler)  # forks inherit it
        try:
            yield first
        finally:
            logging.getLogger(_LOGGER).removeHandler(handler)
            del os.environ[VARIABLE]
            file.unlink()


def note(file: str | None) -> None:
    """Note in this process what ends it. Called in every process of vLLM, more than once.

    Args:
        file: what `VARIABLE` says; None: nobody waits for it.
    """
    logger = logging.getLogger(_LOGGER)
    if file is not None and not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(Path(file)))


class _Notes(logging.Handler):
    """Appends exceptions that are logged as errors to a file, while that is there."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        said = f"{type(error).__name__}: {error}".replace("\0", "")[:_LONGEST]
        try:
            # Never made anew: once the start is over, the name may be somebody else's.
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        except FileNotFoundError:
            return  # the start is over
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{said}\0")
