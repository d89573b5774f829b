"""What the desk asks of an engine: `KVShare` here, or an endpoint elsewhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from kvshare_mm.config import RequestOptions
from kvshare_mm.modalities.seen import SeenMedium
from kvshare_mm.outputs import StreamChunk
from kvshare_mm.reuse.admin import CacheAdmin
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import Modality


class Engine(Protocol):
    """A part of `kvshare_mm.KVShare`; each member is described there."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def modalities(self) -> frozenset[Modality]: ...

    @property
    def has_cache(self) -> bool: ...

    @property
    def cache(self) -> CacheAdmin: ...

    def namespace(self, cache_salt: str | None = None) -> str: ...

    def read(
        self, prompt: Any, params: SamplingParams | None, options: RequestOptions | None
    ) -> Any: ...

    def astream(self, prompt: Any) -> AsyncGenerator[StreamChunk]: ...

    def flush(self, timeout_s: float | None = None) -> bool: ...

    def similar_media(
        self, part: Mapping[str, Any], k: int = 5, cache_salt: str | None = None
    ) -> list[SeenMedium]: ...
