"""KVShare-MM: KV-cache reuse between similar requests, for text and multimodal LLMs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvshare_mm.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    KVShareError,
    ModelLoadError,
    ModelOutputError,
    QueueFullError,
    StoreError,
)
from kvshare_mm.outputs import (
    Provenance,
    RequestMetrics,
    RequestOutput,
    Span,
    StreamChunk,
    TokenLogprob,
)

if TYPE_CHECKING:
    from kvshare_mm.config import KVShareConfig, RequestOptions
    from kvshare_mm.llm import KVShare
    from kvshare_mm.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "EngineClosedError",
    "InvalidRequestError",
    "KVShare",
    "KVShareConfig",
    "KVShareError",
    "ModelLoadError",
    "ModelOutputError",
    "Provenance",
    "QueueFullError",
    "RequestMetrics",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "Span",
    "StoreError",
    "StreamChunk",
    "TokenLogprob",
]

# torch and transformers take seconds to import; who asks for `--help` does not wait for them.
_LATE = {
    "KVShare": "kvshare_mm.llm",
    "KVShareConfig": "kvshare_mm.config",
    "RequestOptions": "kvshare_mm.config",
    "SamplingParams": "kvshare_mm.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
