"""What a caller may name to `KVShare` beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

from kvshare_mm.config import Reuse


class Options(TypedDict, total=False):
    """The fields of `kvshare_mm.config.KVShareConfig`, which describes each, for type checkers."""

    engine: Literal["native", "vllm"]
    engine_options: dict[str, Any]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    trust_remote_code: bool
    attention_backend: Literal["auto", "triton", "torch"]
    max_model_len: int | None
    max_num_seqs: int
    max_queue: int
    prefill_chunk: int | None
    prefill_beside: int | None
    drafts: bool
    reuse: Reuse
    cache_salt: str
    repair: str | None
    max_divergence: float | None
    audit_share: float
    audit_budget: float
    calibration: str | Path | None
    min_run: int
    min_gain_tokens: int
    min_gain_share: float
    max_candidates: int
    max_image_pixels: int
    max_media_bytes: int
    media_workers: int
    media_deadline_s: float
    media_embedder: str | None
    local_media: bool
    store_dir: str | Path | None
    host_bytes: int | None
    donor_dtype: Literal["auto", "q8_0"]
    disk_bytes: int
    index_uri: str | None
    index_token: str | None
    shared_store: str | None
    shared_ttl_s: float
    shared_deadline_ms: float
    embedder: str | None
