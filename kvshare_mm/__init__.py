"""KVShare-MM: KV-cache reuse between similar requests, for text and multimodal LLMs."""

from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    KVShareError,
    ModelLoadError,
    QueueFullError,
    StoreError,
)
from kvshare_mm.llm import KVShare, RequestOptions
from kvshare_mm.outputs import (
    Provenance,
    RequestMetrics,
    RequestOutput,
    Span,
    StreamChunk,
    TokenLogprob,
)
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
