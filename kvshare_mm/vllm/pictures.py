"""Pictures in messages when vLLM runs the model: read as the native engine reads them, where the
connector can share them."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase

from kvshare_mm.assemble import media_of
from kvshare_mm.chat import TEXT_ONLY, MediaSupport
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ModelLoadError
from kvshare_mm.outputs import MediaUse
from kvshare_mm.stream import Modality, SegmentStream

_SEEING = ("qwen2_vl", "qwen2_5_vl")


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
        if model.model_type not in _SEEING:
            return TEXT_ONLY
        processor = AutoProcessor.from_pretrained(source, **options)
    except Exception as error:  # of transformers, the hub, or code from the hub
        raise ModelLoadError(f"Could not load the processor of {source!r}. {error}") from error
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    placeholders = {Modality.IMAGE: int(model.image_token_id)}
    return media_of(config, processor, placeholders, mrope=True)


def prompt_of(stream: SegmentStream) -> dict[str, Any]:
    """A prompt as vLLM takes it: one placeholder a picture, and the pictures."""
    once = np.ones(len(stream), dtype=bool)
    for segment in stream.media:
        once[segment.start + 1 : segment.end] = False
    prompt: dict[str, Any] = {"prompt_token_ids": stream.token_ids[once].tolist()}
    if stream.items:
        prompt["multi_modal_data"] = {"image": [i.content() for i in stream.items if i.content]}
    return prompt


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
