"""Pictures and sound in messages when vLLM runs the model: read as the native engine reads them,
where the connector can share them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase

from kvshare_mm.assemble import media_of
from kvshare_mm.chat import TEXT_ONLY, MediaSupport
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ModelLoadError
from kvshare_mm.models.family import placeholders_of
from kvshare_mm.outputs import MediaUse
from kvshare_mm.stream import Modality, SegmentStream

# Model types that vLLM tells where their media are, and whether their positions have three axes.
_MROPE = {
    "qwen2_vl": True,
    "qwen2_5_vl": True,
    "qwen3_vl": True,
    "qwen3_vl_moe": True,
    "internvl": False,
    "qwen2_audio": False,
}
NOTHING: Mapping[int, tuple[int, ...]] = MappingProxyType({})


def picture_support(
    config: KVShareConfig, source: str, tokenizer: PreTrainedTokenizerBase
) -> MediaSupport:
    """What a model can take beside text. Its processor's chat template becomes the tokenizer's.

    Args:
        source: the model's folder or hub name.

    Raises:
        ModelLoadError: its configuration or processor cannot be read.
    """
    options = {"trust_remote_code": config.trust_remote_code}
    try:
        model = AutoConfig.from_pretrained(source, **options)
        if model.model_type not in _MROPE:
            return TEXT_ONLY
        processor = AutoProcessor.from_pretrained(source, **options)
    except Exception as error:  # of transformers, the hub, or code from the hub
        raise ModelLoadError(f"Could not load the processor of {source!r}. {error}") from error
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    placeholders = placeholders_of(model)
    placeholders.pop(Modality.VIDEO, None)  # vLLM lays out its frames itself
    return media_of(config, processor, placeholders, _MROPE[model.model_type])


def tokens_written(
    media: MediaSupport, tokenizer: PreTrainedTokenizerBase
) -> dict[int, tuple[int, ...]]:
    """`MediaSupport.spelled` in tokens: vLLM's processor writes them too."""
    return {
        int(tokenizer.convert_tokens_to_ids(token)): tuple(
            tokenizer.encode(written, add_special_tokens=False)
        )
        for token, written in media.spelled.items()
    }


def prompt_of(
    stream: SegmentStream, written: Mapping[int, tuple[int, ...]] = NOTHING
) -> dict[str, Any]:
    """A prompt as vLLM takes it: one placeholder a picture or clip, and these.

    Args:
        written: see `tokens_written`.
    """
    once = np.ones(len(stream), dtype=bool)
    media: dict[str, list[Any]] = {}
    for segment, item in zip(stream.media, stream.items, strict=True):
        once[segment.start + 1 : segment.end] = False
        token = int(stream.token_ids[segment.start])
        around = written.get(token, (token,))
        before = around.index(token)
        once[segment.start - before : segment.start] = False
        once[segment.end : segment.end + len(around) - before - 1] = False
        if item.content is not None:
            media.setdefault(item.modality, []).append(item.content())
    prompt: dict[str, Any] = {"prompt_token_ids": stream.token_ids[once].tolist()}
    return {**prompt, "multi_modal_data": media} if media else prompt


def uses_of(stream: SegmentStream, computed_from: int) -> tuple[MediaUse, ...]:
    """What became of a prompt's pictures.

    Args:
        computed_from: where vLLM's own prefill began. What its encoder ran on, and what it still
            knew, is not told apart.
    """
    return tuple(
        MediaUse.of(segment, item, "kv" if segment.end <= computed_from else "encoder")
        for segment, item in zip(stream.media, stream.items, strict=True)
    )
