"""Every option in one place: typed, documented, validated before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvshare_mm.errors import ConfigError, InvalidRequestError, nearest
from kvshare_mm.identity import text_identity
from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.repair import MaxDivergence, RepairPolicy, policy_of

Reuse = Literal["similar", "exact", "off"]
"""How a request reuses: KV of similar requests as well, only of identical prefixes, or none."""

_RENAMED = {"sharing": "reuse"}
_HOST_BYTES, _HOST_TOKENS = 2 << 30, 1 << 16


def refuse_old_words(given: Any) -> Any:
    """Raises ValueError: an option, or a value, by the name that it had once."""
    for old, new in _RENAMED.items():
        if isinstance(given, Mapping) and old in given:
            raise ValueError(f"{old} is called {new} now")
    if isinstance(given, Mapping) and given.get("reuse") == "on":
        raise ValueError('reuse "on" is called "similar" now')
    return given


def wrong_options(error: ValidationError, known: Iterable[str]) -> ConfigError:
    """An error that names every option that is wrong, and which of those known was meant."""
    problems = []
    for found in error.errors():
        name = ".".join(map(str, found["loc"])) or "options"
        said = found["msg"]
        if found["type"] == "extra_forbidden":
            said = f"there is no such option{nearest(name, known)}"
        problems.append(f"{name}: {said}")
    return ConfigError(f"Invalid options: {'; '.join(problems)}")


class KVShareConfig(BaseModel):
    """Options of `kvshare_mm.KVShare`. Unknown names are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "smollm2", description="hub name, folder, .gguf file, smollm2, tiny-vl or tiny-audio"
    )
    engine: Literal["native", "vllm"] = Field("native", description="what runs the model")
    engine_options: dict[str, Any] = Field(
        default_factory=dict, description="vLLM's own arguments, for engine vllm"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and KV; auto is measured"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="run model code that comes from a hub")
    attention_backend: Literal["auto", "triton", "torch"] = Field(
        "auto", description="what computes attention and moves KV; auto is Triton on a GPU"
    )

    max_model_len: int | None = Field(
        None,
        ge=16,
        description="longest prompt plus answer; default: the model's context, 8192 at most",
    )
    max_num_seqs: int = Field(4, ge=1, le=256, description="requests decoded together (KV slots)")
    max_queue: int = Field(256, ge=1, description="requests that may wait; more are refused")
    prefill_chunk: int | None = Field(
        None,
        ge=16,
        description="most tokens of a prompt computed at once; default: 512 on a CPU, 2048 on "
        "a GPU",
    )
    prefill_beside: int | None = Field(
        None,
        ge=1,
        description="most tokens of a prompt computed together with the next token of running "
        "answers, fewer behind a long beginning: fewer keep the answers faster, more are sooner "
        "done; default: 128 on a CPU, 512 on a GPU",
    )

    drafts: bool = Field(
        True,
        description="decode several tokens at once where the answer to a similar request, or the "
        "prompt, tells what may come; answers stay the same",
    )

    reuse: Reuse = Field(
        "similar", description="reuse similar requests' KV, only exact prefixes, or nothing"
    )
    cache_salt: str = Field("", description="only requests with the same salt share KV")
    repair: str | None = Field(
        None,
        description="which kept positions are recomputed: none, window:K, tail:K, "
        "auto:KL (several joined with +); default: auto:0.01",
    )
    max_divergence: float | None = Field(
        None,
        ge=0,
        description="how far the first token may be from full recompute (KL, nats): smaller is "
        "closer, larger is faster; default: 0.01",
    )
    audit_share: float = Field(
        0.02,
        ge=0,
        le=1,
        description="share of similar requests that are computed in full afterwards, when nothing "
        "waits, to learn how far answers really are (of a tenant's first ones a fourth, until 30 "
        "were); 0: none",
    )
    audit_budget: float = Field(
        2000, gt=0, description="tokens a second that audits compute at most"
    )
    calibration: Path | None = Field(
        None,
        description="file of `kvshare calibrate`: what was learned before; a store that has "
        "learned itself goes first",
    )
    min_run: int = Field(4, ge=1, description="shortest run of equal tokens that is kept")
    min_gain_tokens: int = Field(16, ge=1, description="fewest similar tokens worth an edit")
    min_gain_share: float = Field(
        0.3, ge=0, le=1, description="least share of the remaining prompt that must be kept"
    )
    max_candidates: int = Field(4, ge=1, le=64, description="donors considered for a request")

    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        description="pixels of the largest picture that is decoded, or of all frames of a video; "
        "larger ones are refused",
    )
    max_media_bytes: int = Field(
        64 << 20, ge=1, description="largest picture, sound file or video, as it is sent"
    )
    media_workers: int = Field(
        0,
        ge=0,
        le=64,
        description="processes that decode pictures and sound, each killed when it hangs or grows; "
        "0: they are decoded in this process",
    )
    media_deadline_s: float = Field(
        10.0, gt=0, description="seconds that a decoding process gets for a picture or a clip"
    )
    media_embedder: str | None = Field(
        None,
        description="open_clip model that finds similar pictures, for showing: tiny-clip, a folder "
        "or ARCHITECTURE/WEIGHTS; none: off",
    )
    local_media: bool = Field(
        True, description="read pictures and sound from paths on this machine"
    )

    store_dir: Path | None = Field(
        None, description="folder that keeps donors over a restart; default: they are in RAM only"
    )
    host_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="budget in RAM: donor KV, and half of it at most for what is known of others; "
        "default: 65,536 tokens of the model's KV, but 2 GiB at least, and beyond that a quarter "
        "of the RAM at most (inside vLLM 2 GiB)",
    )
    donor_dtype: Literal["auto", "q8_0"] = Field(
        "auto",
        description="how donors' K and V are kept: auto is as the model computes them, q8_0 eight "
        "bits (half the bytes of 16-bit KV, and then `exact` is but for that rounding)",
    )
    disk_bytes: int = Field(20 << 30, ge=1 << 20, description="budget of donor KV on disk")
    index_uri: str | None = Field(
        None,
        description="Milvus server or Lite file (*.db) for dense search; default: in store_dir",
    )
    index_token: str | None = Field(None, description="Milvus credentials, 'user:password'")
    shared_store: str | None = Field(
        None,
        description="Redis or Valkey (redis://host:6379/0) or Mooncake (mooncake://master:50051) "
        "that keeps donors for other replicas, who find them in index_uri's Milvus server",
    )
    shared_ttl_s: float = Field(
        3600,
        gt=0,
        le=1e9,  # 30 years: Redis and Milvus count in integers
        description="seconds that a donor stays there after its last use",
    )
    shared_deadline_ms: float = Field(
        15,
        gt=0,
        description="longest that a prompt waits to hear whether another replica has a donor, or "
        "2% of the time that computing it takes, where that is more",
    )
    embedder: str | None = Field(
        "all-MiniLM-L6-v2", description="sentence-transformers model for dense search; none: off"
    )

    _words = model_validator(mode="before")(refuse_old_words)

    def host_budget(self, bytes_per_token: int = 0) -> int:
        """`host_bytes`, or what it is by default for a model's KV."""
        if self.host_bytes is not None:
            return self.host_bytes
        if not hasattr(os, "sysconf"):  # Windows does not say so easily how much RAM there is
            return _HOST_BYTES
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return max(_HOST_BYTES, min(_HOST_TOKENS * bytes_per_token, ram // 4))

    @field_validator("index_uri")
    @classmethod
    def _known_index(cls, value: str | None) -> str | None:
        if value and not value.endswith(".db") and "://" not in value and value[:5] != "unix:":
            raise ValueError("neither a server (http://host:19530) nor a Milvus Lite file (*.db)")
        return value

    @field_validator("embedder", "media_embedder")
    @classmethod
    def _off(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @field_validator("store_dir", "calibration")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value else None

    @model_validator(mode="after")
    def _whose_options(self) -> KVShareConfig:
        if self.engine == "native" and self.engine_options:
            raise ValueError("engine_options are for engine='vllm'")
        if self.engine == "vllm" and self.shared_store:
            raise ValueError("shared_store is for engine='native'")
        return self

    @model_validator(mode="after")
    def _shared_index(self) -> KVShareConfig:
        if self.shared_store and not (self.index_uri and "://" in self.index_uri):
            raise ValueError("shared_store needs index_uri: a Milvus server that replicas share")
        return self

    @model_validator(mode="after")
    def _one_policy(self) -> KVShareConfig:
        policy_of(self.repair, self.max_divergence)
        return self

    @classmethod
    def of(cls, **options: Any) -> KVShareConfig:
        """Validated options. Raises ConfigError naming the option that is wrong."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise wrong_options(error, cls.model_fields) from error

    @property
    def packed(self) -> bool:
        """Whether donors' KV is kept in eight bits."""
        return self.donor_dtype == "q8_0"

    def fingerprint(self, model: str) -> str:
        """What namespaces begin with, of a model's own: KV that was rounded, or computed from
        such, is never taken for the other."""
        return text_identity(f"{model} {self.donor_dtype}") if self.packed else model

    @property
    def policy(self) -> RepairPolicy:
        return policy_of(self.repair, self.max_divergence) or MaxDivergence()

    @property
    def planner(self) -> PlannerOptions:
        return PlannerOptions(
            min_run=self.min_run,
            min_gain_tokens=self.min_gain_tokens,
            min_gain_share=self.min_gain_share,
            exact_only=self.reuse == "exact",
        )


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a single request may set for itself; None means the engine's setting.

    Attributes:
        reuse: "similar", "exact" or "off".
        repair: repair policy, e.g. "window:8".
        max_divergence: largest first-token KL in nats that repairs aim at, instead of `repair`.
        cache_salt: only requests with the same salt share KV.
        store: whether the request becomes a donor.
        tenant: whose request it is. Where several tenants wait, the native engine gives each the
            same share of its time; vLLM's scheduler serves as requests come.

    Raises:
        InvalidRequestError: a value that does not exist, with the field's name.
    """

    reuse: Reuse | None = None
    repair: str | None = None
    cache_salt: str | None = None
    store: bool = True
    max_divergence: float | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        bound = self.max_divergence
        checks = {
            "reuse": self.reuse is None or self.reuse in get_args(Reuse),
            "repair": self.repair is None or isinstance(self.repair, str),
            "max_divergence": bound is None
            or (isinstance(bound, int | float) and not isinstance(bound, bool)),
            "cache_salt": self.cache_salt is None or isinstance(self.cache_salt, str),
            "store": isinstance(self.store, bool),
            "tenant": isinstance(self.tenant, str),
        }
        for name, good in checks.items():
            if not good:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} is not allowed; see RequestOptions", name
                )
        asked = "repair" if bound is None else "max_divergence"
        try:
            policy_of(self.repair, bound)
        except ValueError as error:
            raise InvalidRequestError(
                f"{asked}={getattr(self, asked)!r}: {error}", asked
            ) from error

    @property
    def policy(self) -> RepairPolicy | None:
        """The repairs that it names; None: it names none."""
        return policy_of(self.repair, self.max_divergence)
