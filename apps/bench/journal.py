"""Resumable runs: each result goes to a file as soon as it is known."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import xxhash

logger = logging.getLogger(__name__)


def settings_key(settings: Any) -> str:
    """A short name for everything that decides a result, given as JSON-ready data."""
    return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode())


class Journal:
    """Results of one run by key, kept in a JSON Lines file until the run is complete.

    The first line names the settings. A journal of other settings is of no use and is replaced; a
    last line that was cut short when the run was killed is measured again.

    Args:
        path: the file; None keeps results in memory only.
        settings: JSON-ready data that decide the results.
    """

    def __init__(self, path: Path | None, settings: Any) -> None:
        self._path = path
        self._results: dict[str, Any] = {}
        self._header = settings_key(settings)
        if path is None:
            return
        if path.exists():
            self._results = self._read(path)
        # What was read is written anew: a torn line must not have others appended to it.
        lines = [self._line("settings", self._header)]
        lines += [self._line(key, result) for key, result in self._results.items()]
        path.write_text("".join(lines), encoding="utf-8")
        if self._results:
            logger.warning("going on with %s: %d results are known", path, len(self._results))

    @classmethod
    def beside(cls, report: Path | None, settings: Any) -> Journal:
        """The journal of a report, in the same folder: ``name.json.partial``."""
        return cls(_partial(report) if report else None, settings)

    @staticmethod
    def forget(report: Path | None) -> None:
        """The report is written: its journal is no longer needed."""
        if report:
            _partial(report).unlink(missing_ok=True)

    def get(self, key: str) -> Any | None:
        """The result of `key`, or None if it is not known yet."""
        return self._results.get(key)

    def put(self, key: str, result: Any) -> None:
        """Keep a JSON-ready result."""
        self._results[key] = result
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._line(key, result))

    @staticmethod
    def _line(key: str, result: Any) -> str:
        return json.dumps({"key": key, "result": result}) + "\n"

    def _read(self, path: Path) -> dict[str, Any]:
        results = {}
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                key, result = record["key"], record["result"]
            except (ValueError, KeyError, TypeError):
                continue
            results[key] = result
        return results if results.pop("settings", None) == self._header else {}


def _partial(report: Path) -> Path:
    return report.with_name(report.name + ".partial")
