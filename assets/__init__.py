"""Small models that were trained for this project, and what they were trained with."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """An installed folder: ``workloads``, or a model: ``tiny-vl``, ``tiny-audio``, ``tiny-clip``.

    Raises:
        FileNotFoundError: nothing of that name was installed.
    """
    path = Path(__file__).resolve().parent / name
    if not path.is_dir():
        raise FileNotFoundError(f"no {name!r} beside {__file__}")
    return path
