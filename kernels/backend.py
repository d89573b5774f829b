"""Which implementation runs: Triton's compiled kernels, its interpreter, or plain torch."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]
_MIN_TRITON = (3, 4)
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here; says what to do."""


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``).

    Triton decides when it is first imported, for the whole process: what is interpreted is not
    compiled, and the other way round.
    """
    import triton

    return bool(triton.knobs.runtime.interpret)


def require_triton() -> None:
    """Raises BackendError if Triton is not installed or too old."""
    found = _triton_version()
    if found < _MIN_TRITON:
        wanted = ".".join(map(str, _MIN_TRITON))
        raise BackendError(
            f"Triton {wanted} or newer is not installed. torch's CUDA builds bring it along; "
            f"elsewhere on Linux: pip install 'triton>={wanted}'. "
            "Without it, use the backend 'torch'."
        )


@cache
def _triton_version() -> tuple[int, int]:
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return (0, 0)
    return int(major), int(minor)


def resolve(backend: str, device: torch.device) -> Literal["triton", "torch"]:
    """What `backend` means for tensors on `device`.

    ``auto`` is Triton on a GPU if it is installed, and torch everywhere else.

    Raises:
        BackendError: there is no such backend, or it cannot run there.
    """
    if backend not in BACKENDS:
        raise BackendError(f"attention backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        usable = device.type == "cuda" and _triton_version() >= _MIN_TRITON
        return "triton" if usable and not interpreting() else "torch"
    require_triton()
    if device.type == "cpu" and not interpreting():
        raise BackendError(
            f"Triton needs a GPU and not the device {str(device)!r}. For tests, its interpreter "
            "runs on the CPU, slowly: set TRITON_INTERPRET=1 before Python starts."
        )
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"Triton does not run on the device {str(device)!r}")
    return "triton"
