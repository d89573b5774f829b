"""Small models that were trained for this project, and what they were trained with."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """Folder of an embedded model: ``tiny-vl``, ``tiny-audio`` or ``tiny-clip``.

    Raises:
        FileNotFoundError: no model of that name was installed.
    """
    path = Path(__file__).resolve().parent / name
    if not path.is_dir():
        raise FileNotFoundError(f"no embedded model {name!r} beside {__file__}")
    return path
