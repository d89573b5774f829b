"""Builds the parts of a server from its configuration, in the order they depend on each other."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvshare_mm.chat import TEXT_ONLY, MediaSupport
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ConfigError
from kvshare_mm.grammar import Grammars
from kvshare_mm.index.semantic import Opened
from kvshare_mm.index.shared import SharedCatalogue
from kvshare_mm.learned import open_calibration
from kvshare_mm.modalities.decode_pool import DecodePool
from kvshare_mm.modalities.decoding import Decoder, InProcess
from kvshare_mm.modalities.registry import adapters_for
from kvshare_mm.modalities.seen import SeenMedia, opener
from kvshare_mm.modalities.sources import MediaSources
from kvshare_mm.models.loader import LoadedModel, load_model
from kvshare_mm.native.audit import Auditor
from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.engine import NativeEngine
from kvshare_mm.native.plain import PlainRunner
from kvshare_mm.native.prefill import Prefiller
from kvshare_mm.native.slots import ModelRunner, SlotRunner
from kvshare_mm.native.states import StateRunner
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.plan import Decline
from kvshare_mm.reuse.shared import SharedDonors
from kvshare_mm.reuse.words import joining_tokens
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.store.remote_mooncake import MooncakeStore
from kvshare_mm.store.remote_redis import RedisStore
from kvshare_mm.store.shared import RemoteStore, SharedTier
from kvshare_mm.stream import Modality

if TYPE_CHECKING:
    from kvshare_mm.modalities.embed import TextEmbedder

logger = logging.getLogger(__name__)

_DEFAULT_MAX_LEN = 8192
# On a CPU larger chunks are no faster, and whoever comes meanwhile waits for one of them.
_CPU_CHUNK, _GPU_CHUNK = 512, 2048
# See `kvshare bench streams`: smaller chunks keep answers faster and cost a CPU much throughput.
_CPU_BESIDE, _GPU_BESIDE = 128, 512


@dataclass(frozen=True, slots=True)
class Parts:
    """A running server."""

    loaded: LoadedModel
    runner: ModelRunner
    prefiller: Prefiller
    donors: DonorPool | None
    engine: NativeEngine
    media: MediaSupport = TEXT_ONLY
    encoder: MediaEncoder | None = None
    seen: SeenMedia | None = None
    decoder: Decoder = field(default_factory=InProcess)
    auditor: Auditor | None = None
    grammars: Grammars | None = None
    embedder: Callable[[], TextEmbedder] | None = None

    def stats(self) -> dict[str, Any]:
        """Counters since the start and sizes now.

        Returns:
            ``requests``: counts by outcome and prompt tokens by provenance; ``queue``: waiting and
            running; if KV can be shared, ``donors``: number, tokens owned and stored, bytes by
            tier, events; ``audits``, where requests are audited; and of a multimodal model
            ``media``: encoder runs and hits.
        """
        engine = self.engine
        stats: dict[str, Any] = {
            "model": self.loaded.name,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "unsupported": self.loaded.unsupported,
            "requests": dict(engine.counters),
            "queue": {"waiting": engine.num_waiting, "running": engine.num_running},
        }
        if self.donors is not None:
            tree = self.donors.tree
            stats["donors"] = {
                "nodes": len(tree),
                "tokens_owned": tree.num_tokens_owned,
                "tokens_whole": tree.num_tokens_whole,
                "bytes": self.donors.store.bytes_by_tier(),
                "events": {**self.donors.counters, **self.donors.store.counters},
            }
        if self.auditor is not None:
            stats["audits"] = self.auditor.stats
        if self.encoder is not None:
            seen = self.seen.counters if self.seen else {}
            decoded = self.decoder.counters
            stats["media"] = {
                "tower_runs": 0,
                "tower_hits": 0,
                **self.encoder.counters,
                **seen,
                **{f"decoder_{name}": count for name, count in decoded.items()},
            }
        return stats

    def wait_audited(self, timeout_s: float | None) -> bool:
        return self.engine.wait_audited(timeout_s)

    def flush(self, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        saved = self.engine.wait_saved(left())
        seen = self.seen is None or self.seen.flush(left())
        return saved and seen and (self.donors is None or self.donors.flush(left()))

    def close(self) -> None:
        self.decoder.close()
        self.engine.close()
        if self.seen is not None:
            self.seen.close()
        if self.donors is not None:
            self.donors.close()


def assemble(config: KVShareConfig) -> Parts:
    """Load the model and start a server.

    Raises:
        ConfigError, ModelLoadError, StoreError: what is wrong, before anything is served.
    """
    # The store first: a folder that cannot be written is known in a moment, a model is not.
    disk = DiskTier(config.store_dir / "kv", config.disk_bytes) if config.store_dir else None
    remote = _remote(config.shared_store) if config.shared_store else None
    loaded = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        attention_backend=config.attention_backend,
    )
    loaded = replace(loaded, fingerprint=config.fingerprint(loaded.fingerprint))
    embedder = text_embedder(config) if config.embedder else None
    max_len = min(config.max_model_len or _DEFAULT_MAX_LEN, loaded.context_len)
    if config.max_model_len and config.max_model_len > loaded.context_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the model's context of "
            f"{loaded.context_len} tokens"
        )
    donors: DonorPool | None = None
    runner: ModelRunner
    on_cpu = loaded.device.type == "cpu"
    chunk = config.prefill_chunk or (_CPU_CHUNK if on_cpu else _GPU_CHUNK)
    beside = config.prefill_beside or (_CPU_BESIDE if on_cpu else _GPU_BESIDE)
    if loaded.states is not None:
        runner = StateRunner(loaded, config.max_num_seqs, chunk)
    elif loaded.unsupported:
        runner = PlainRunner(loaded, config.max_num_seqs)
    else:
        runner = SlotRunner(
            loaded, config.max_num_seqs, max_len, chunk, drafts=config.drafts, beside=beside
        )
    if config.reuse != "off" and isinstance(runner, SlotRunner):
        donors = _donors(config, loaded, disk, embedder, remote)
    elif config.reuse != "off" and isinstance(runner, StateRunner):
        # By meaning, nothing is found that helps, and states are not shared with other replicas.
        donors = _donors(config, loaded, disk, None, None)
    encoder = None
    if loaded.family is not None:
        encoder = MediaEncoder(loaded, donors.store if donors else None)
    prefiller = Prefiller(runner, donors, config.planner, config.policy, encoder)
    auditor = None
    if donors is not None and isinstance(runner, SlotRunner):
        calibration = open_calibration(config, donors.reuse, loaded.fingerprint)
        if calibration is not None and config.audit_share:
            auditor = Auditor(
                runner,
                calibration,
                config.audit_share,
                config.audit_budget,
                loaded.tokenizer,
                encoder,
            )
    engine = NativeEngine(
        loaded,
        runner,
        prefiller,
        donors,
        max_len,
        config.max_queue,
        auditor,
        config.shared_deadline_ms / 1000,
    )
    seen = None
    decoder: Decoder = InProcess()
    if loaded.family is not None:
        if config.media_embedder:
            seen = SeenMedia(opener(config.media_embedder))
        if config.media_workers:
            decoder = DecodePool(
                config.media_workers, config.media_deadline_s, config.max_image_pixels
            )
    media = media_support(loaded, config, decoder)
    return Parts(
        loaded,
        runner,
        prefiller,
        donors,
        engine,
        media,
        encoder,
        seen,
        decoder,
        auditor,
        Grammars(loaded.tokenizer, loaded.eos_token_ids),
        embedder,
    )


def _remote(url: str) -> RemoteStore:
    return MooncakeStore(url) if url.startswith("mooncake:") else RedisStore(url)


def media_support(
    loaded: LoadedModel, config: KVShareConfig, decoder: Decoder | None = None
) -> MediaSupport:
    """What a model can take beside text."""
    family = loaded.family
    if family is None:
        return TEXT_ONLY
    rate = getattr(family, "tokens_per_second", None)
    return media_of(config, loaded.processor, family.placeholders, family.mrope, decoder, rate)


def media_of(
    config: KVShareConfig,
    processor: Any,
    placeholders: Mapping[Modality, int],
    mrope: bool,
    decoder: Decoder | None = None,
    tokens_per_second: float | None = None,
) -> MediaSupport:
    """What a multimodal model can take beside text.

    Args:
        processor: transformers' processor of the model.
        placeholders: the token that stands for a medium, by modality.
        mrope: whether its positions have three axes.
        decoder: of files; None: they are decoded in this process.
        tokens_per_second: of video, see `VideoAdapter`.
    """
    sources = MediaSources(config.max_media_bytes, config.local_media)
    pixels = config.max_image_pixels
    adapters = adapters_for(processor, placeholders, sources, pixels, decoder, tokens_per_second)
    return MediaSupport(adapters, placeholders, mrope, _spelled(processor))


def _spelled(processor: Any) -> dict[str, str]:
    """Some processors put text around a picture, where others have it in the template."""
    token = str(getattr(processor, "image_token", ""))
    if (written := getattr(processor, "full_image_sequence", None)) is not None:  # Gemma 3
        place = processor.tokenizer.image_token
        return {token: written.replace(place * processor.image_seq_length, place)}
    start, end = (getattr(processor, f"{name}_image_token", None) for name in ("start", "end"))
    return {token: f"{start}{token}{end}"} if start and end else {}  # InternVL


def _donors(
    config: KVShareConfig,
    loaded: LoadedModel,
    disk: DiskTier | None,
    embedder: Callable[[], TextEmbedder] | None,
    remote: RemoteStore | None,
) -> DonorPool:
    shape, only_exact = loaded.kv_shape, None
    packed = config.packed and loaded.states is None
    if loaded.states is not None:
        shape, stateful = loaded.states.kv_shape, bool(loaded.states.states)
        only_exact = Decline.RECURRENT_LAYERS if stateful else Decline.UNSUPPORTED_MODEL
    per_token = shape.bytes_per_token(loaded.dtype, packed) if shape else 0
    budget = config.host_budget(per_token)
    if per_token:
        logger.info(
            "KV of %d tokens fits into %.1f GiB of RAM", budget // per_token, budget / 2**30
        )
    donors = DonorPool(
        loaded.fingerprint,
        KVEditor(loaded.rotary, loaded.attention_backend),
        HostTier(budget),
        disk,
        open_dense(config, loaded.fingerprint, embedder) if embedder else None,
        config.max_candidates,
        joining_tokens(loaded.tokenizer),
        only_exact,
        packed,
    )
    if remote is not None:
        ttl_s = config.shared_ttl_s
        catalogue = SharedCatalogue(
            str(config.index_uri), uuid.uuid4().hex, ttl_s, config.index_token or ""
        )
        donors.shared = SharedDonors(donors, SharedTier(remote, ttl_s), catalogue)
    return donors


def text_embedder(config: KVShareConfig) -> Callable[[], TextEmbedder]:
    """Loads the embedder when it is first asked for."""

    @cache
    def load() -> TextEmbedder:
        from kvshare_mm.modalities.embed import TextEmbedder

        return TextEmbedder(str(config.embedder))

    return load


def open_dense(
    config: KVShareConfig, fingerprint: str, load: Callable[[], TextEmbedder] | None = None
) -> Callable[[], Opened]:
    """Opens the index of meaning; heavy imports and connections happen when it is called.

    Args:
        load: gives the embedder; None: one of its own.
    """

    def open_index() -> Opened:
        from kvshare_mm.index.milvus import MilvusIndex

        embedder = (load or text_embedder(config))()
        uri = config.index_uri
        if uri is None:
            # One file per model: two servers with different models can share a store folder.
            folder = config.store_dir or _scratch_folder()
            uri = str(folder / f"milvus-{fingerprint[:16]}.db")
        index = MilvusIndex(uri, embedder.dim, embedder.name, token=config.index_token or "")
        return index, lambda text: embedder.embed([text])[0]

    return open_index


def _scratch_folder() -> Path:
    """A folder that is gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="kvshare-index-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
