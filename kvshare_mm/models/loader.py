"""One loader for every causal language model: a hub name, a folder, a GGUF file, or `smollm2`."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from kvshare_mm import assets
from kvshare_mm.attention import attention_name
from kvshare_mm.errors import ConfigError, ModelLoadError
from kvshare_mm.kernels.backend import BackendError, resolve
from kvshare_mm.modalities.loading import loading
from kvshare_mm.models.family import Family, load_family, load_text_part
from kvshare_mm.models.few_rows import speed_up
from kvshare_mm.models.gguf import converted, embedded_gguf
from kvshare_mm.models.names import EMBEDDED, SHIPPED, refuse_unknown
from kvshare_mm.models.shape import KVShape
from kvshare_mm.models.states import StateLayout
from kvshare_mm.models.support import check_support
from kvshare_mm.reuse.rotary import RotarySpec

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to serve.

    Attributes:
        name: as the user gave it.
        model: the transformers module, in eval mode; of a multimodal model its language part.
        tokenizer: its tokenizer.
        device: where it runs.
        dtype: of weights and KV.
        context_len: the model's own limit in tokens.
        eos_token_ids: tokens that end an answer.
        fingerprint: names weights, dtype, RoPE and tokenizer: the namespace's first part.
        rotary: how keys are re-rotated; None if KV cannot be moved.
        kv_shape: of one position's KV; None if KV cannot be moved.
        unsupported: why KV cannot be moved, in words, or None.
        states: how an unsupported model goes on behind an identical beginning; None: not at all.
        attention_backend: what computes PartialAttention and moves KV: "triton" or "torch".
        family: encoders and placeholders; None for a model of text alone.
        processor: transformers' processor of a multimodal model, or None.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    context_len: int
    eos_token_ids: frozenset[int]
    fingerprint: str
    rotary: RotarySpec | None
    kv_shape: KVShape | None
    unsupported: str | None
    states: StateLayout | None = None
    attention_backend: str = "torch"
    family: Family | None = None
    processor: Any = None


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attention_backend: str = "auto",
) -> LoadedModel:
    """Load a model and find out whether its KV can be re-used at other positions.

    Args:
        name: hub name, folder, ``.gguf`` file, or an embedded model: ``smollm2``, ``tiny-vl``,
            ``tiny-audio``.
        dtype: "float32", "bfloat16", "float16", or "auto": the model's own unless a short
            measurement shows that float32 is faster on this machine.
        device: a torch device, or "auto": the GPU if there is one.
        trust_remote_code: run model code from the hub.
        attention_backend: "triton", "torch", or "auto": Triton on a GPU.

    Raises:
        ModelLoadError: there is no such model, or it cannot be loaded.
        ConfigError: dtype, device or attention_backend are not known or cannot be used here.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    target = _device(device)
    try:
        backend = resolve(attention_backend, target)
    except BackendError as error:
        raise ConfigError(str(error)) from error
    source = locate(name)
    try:
        with loading():
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            chosen = _dtype(dtype, config, target)
            trusted = {"trust_remote_code": trust_remote_code}
            options = {"dtype": chosen, "output_loading_info": True, **trusted}
            processor: Any = None
            family: Family | None = None
            language: Any
            if (loaded := load_family(config.model_type, source, **options)) is not None:
                model, family, report = loaded
                language = family.decoder
                processor = _processor(name, source, family, trusted)
                family = family if processor is not None else None
            elif (part := load_text_part(config, source, **options)) is not None:
                model, language, report = part
                logger.warning("%s is served with text alone: no media are known of it", name)
            else:
                model, report = AutoModelForCausalLM.from_pretrained(source, **options)
                language = model
            if processor is not None:
                tokenizer = processor.tokenizer
                tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
            else:
                tokenizer = AutoTokenizer.from_pretrained(source, **trusted)
    except Exception as error:  # of transformers, safetensors, the hub, or code from the hub
        here = ", ".join((*EMBEDDED, *SHIPPED))
        hint = "" if Path(source).exists() else f" It is no folder, and none of {here}."
        raise ModelLoadError(f"Could not load the model {name!r}.{hint} {error}") from error
    if report["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(report["missing_keys"])
        raise ModelLoadError(f"The model {name!r} lacks {len(missing)} weights, e.g. {missing[0]}")
    model = model.to(target).eval().requires_grad_(False)
    speed_up(language)
    support = check_support(language, attention_name(backend))
    if support.states is not None:
        size = support.states.num_bytes
        logger.warning("%s reuses identical beginnings alone: %s", name, support.reason)
        logger.info("a kept state of it takes %.1f MiB", size / 2**20)
    elif support.reason:
        logger.warning("%s is served without KV reuse: %s", name, support.reason)
    if support.reason and family is not None and family.both_ways:
        # Only PartialAttention is told what a picture's positions see.
        logger.warning("%s is served with text alone: %s", name, support.reason)
        family = processor = None
    return LoadedModel(
        name=name,
        model=language,
        tokenizer=tokenizer,
        device=target,
        dtype=chosen,
        context_len=int(getattr(language.config, "max_position_embeddings", None) or 1 << 20),
        eos_token_ids=_eos(model, tokenizer),
        fingerprint=_fingerprint(model, tokenizer),
        rotary=support.rotary,
        kv_shape=support.kv_shape,
        unsupported=support.reason,
        states=support.states,
        attention_backend=backend,
        family=family,
        processor=processor,
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone. Raises ModelLoadError."""
    try:
        return AutoTokenizer.from_pretrained(locate(name), trust_remote_code=trust_remote_code)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"Could not load the tokenizer of {name!r}. {error}") from error


def read_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model in a folder or at the hub. Raises ModelLoadError."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, the hub, or code from the hub
        raise ModelLoadError(f"Could not read the model {source!r}. {error}") from error


def measured_dtype(source: str, device: str = "auto", *, trust_remote_code: bool = False) -> str:
    """What dtype "auto" means for a model on this machine, e.g. "float32".

    Args:
        source: a folder or hub name, see `locate`.

    Raises:
        ModelLoadError: the model's configuration cannot be read.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    return str(_dtype("auto", config, _device(device))).removeprefix("torch.")


def is_installed(name: str) -> bool:
    """Whether an embedded model, ``tiny-vl`` or ``tiny-audio``, came with this installation."""
    try:
        assets.folder(name)
    except FileNotFoundError:
        return False
    return name in SHIPPED


def locate(name: str) -> str:
    """The folder of a model that is here, converting it first if need be, or its hub name.

    Raises:
        ModelLoadError: there is no such folder or file, or it cannot be converted.
    """
    if name in EMBEDDED:
        return str(converted(embedded_gguf(name)))
    if name in SHIPPED:
        try:
            return str(assets.folder(name))
        except FileNotFoundError as error:
            raise ModelLoadError(f"The model {name!r} is not installed: {error}") from error
    if name.endswith(".gguf"):
        return str(converted(Path(name).expanduser()))
    refuse_unknown(name)
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _processor(name: str, source: str, family: Family, trusted: dict[str, bool]) -> Any:
    """A multimodal model's; None: it is served with text alone.

    Only a Gemma 3 is, whose folder may hold what was trained on text and say nothing of pictures.
    """
    try:
        return AutoProcessor.from_pretrained(source, **trusted)
    except Exception as error:  # of transformers, the hub, or code from the hub
        if not family.both_ways:
            raise
        logger.warning("%s is served with text alone: %s", name, error)
        return None


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known to torch") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} asks for a GPU, and torch sees none")
    try:
        torch.zeros(1, device=found).item()
    except Exception as error:  # each backend fails in its own way
        raise ConfigError(f"device {device!r} cannot be used here: {error}") from error
    return found


def _dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    text = config.get_text_config()  # a multimodal model's widths and dtype may stand only there
    own = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    if device.type != "cpu" or own == torch.float32:
        return own
    width = int(getattr(text, "hidden_size", 1024))
    slow, fast = _matmul_seconds(width, own), _matmul_seconds(width, torch.float32)
    if slow > fast:
        logger.info("float32 instead of %s: %.1f times faster on this CPU", own, slow / fast)
        return torch.float32
    return own


def _matmul_seconds(width: int, dtype: torch.dtype, rows: int = 64, repeats: int = 5) -> float:
    x, w = torch.ones(rows, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best


def _eos(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: set[int] = set()
    for eos in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return frozenset(ids)


def _fingerprint(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """128 bits over the configuration, the vocabulary and every weight (10 GB a second)."""
    # No cryptographic hash, which would take ten times as long: nothing of this comes with a
    # request, and who chooses the weights needs no collision to make answers wrong.
    digest = xxhash.xxh3_128()
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "_attn_implementation"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    # All of it: fine-tuning may change no more than the embeddings of a few new tokens.
    for name, weight in model.state_dict().items():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()
