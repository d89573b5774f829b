"""JSON Lines files: one value a line, and every mistake named with its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kvshare_mm.errors import ConfigError


def read_jsonl(path: Path, *fields: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file, empty lines left out.

    Args:
        path: UTF-8 text. Only a line feed ends a line: JSON strings may hold U+2028 and its like,
            which `str.splitlines` would cut at.
        fields: names that every object must have.
        limit: read the first so many objects; None for all.

    Raises:
        ConfigError: the file cannot be read, has no objects, or a line is none of them; says which.
    """
    records: list[dict[str, Any]] = []
    for number, record in islice(numbered(path), limit):
        missing = [name for name in fields if name not in record]
        if missing:
            raise ConfigError(f"{path}:{number} has no field {', '.join(missing)}")
        records.append(record)
    if not records:
        raise ConfigError(f"{path} has no lines to read")
    return records


def numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects with the numbers of their lines, from 1; empty lines left out.

    Raises:
        ConfigError: the file cannot be read, or a line is no object; says which.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{path}:{number} is no JSON object")
        yield number, record


def read_text(path: Path) -> str:
    """A UTF-8 file as text. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
