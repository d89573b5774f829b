"""A model whose pictures the native engine does not take: vLLM tells where they are, which is
enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from .. import media_models
from .engines import Shared, shared_engine, stock_engine, stock_tokens, summary, tokens

pytestmark = pytest.mark.vllm

LENGTH = 8
PICTURE_TOKENS = 16
TEXT = "Sort this parcel by its sender, then say to which of our two warehouses it goes. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llava")
    tok = media_models.tokenizer()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7, "projection_dim": 32}
    text = {**media_models._TEXT, "hidden_size": 128, "vocab_size": len(tok)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config={"model_type": "clip_vision_model", **vision},
                text_config={"model_type": "llama", **text, "eos_token_id": tok.eos_token_id},
                image_token_id=tok.convert_tokens_to_ids("<|image_pad|>"),
                image_seq_length=PICTURE_TOKENS,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.15)
    model.save_pretrained(made)
    media_models.rename(made / "model.safetensors", {"vision_tower.": "vision_tower.vision_model."})
    pixels = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    LlavaProcessor(
        CLIPImageProcessor(**pixels),
        tok,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
    ).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 1}
    with shared_engine(folder, options, max_model_len=512) as made:
        yield made


@pytest.fixture(scope="module")
def stock(folder: Path) -> Iterator[Any]:
    with stock_engine(folder, max_model_len=512) as made:
        yield made


def prompt(*parts: str | int) -> dict[str, Any]:
    """Text, and pictures by their numbers."""
    tok, ids, pictures = media_models.tokenizer(), [], []
    for part in parts:
        if isinstance(part, str):
            ids += tok.encode(part)
        else:
            ids.append(tok.convert_tokens_to_ids("<|image_pad|>"))
            pixels = np.random.default_rng(part).integers(0, 256, (40, 60, 3), np.uint8)
            pictures.append(Image.fromarray(pixels))
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": pictures}}


@pytest.fixture(autouse=True)
def fresh(engine: Shared) -> Iterator[None]:
    engine.forget()
    with engine.keeping_its_blocks():
        yield


def test_a_picture_that_moved_is_kept(engine: Shared) -> None:
    engine.serve(prompt("Tom: ", 1, TEXT), LENGTH)
    target = prompt("From Alexandra: ", 1, TEXT)
    use = summary(engine.serve(target, LENGTH, repair="tail:16"))
    length = len(target["prompt_token_ids"]) - 1 + PICTURE_TOKENS
    assert use["reused"] > PICTURE_TOKENS + 40
    assert use["exact"] + use["reused"] + use["recomputed"] == length


def test_a_new_picture_is_computed(engine: Shared) -> None:
    engine.serve(prompt(TEXT, 1, TEXT), LENGTH)
    use = summary(engine.serve(prompt(TEXT, 2, TEXT), LENGTH, repair="tail:16"))
    assert use["exact"] == len(TEXT) and not use["reused"]
    assert use["declined"] == "new_picture"


def test_what_is_exact_gives_the_answer_of_stock_vllm(engine: Shared, stock: Any) -> None:
    engine.serve(prompt(TEXT, 1, TEXT), LENGTH)
    assert engine.llm.reset_prefix_cache()
    target = prompt(TEXT, 1, "Sort them by weight. " + TEXT)
    output = engine.serve(target, LENGTH, reuse="exact")
    assert summary(output)["exact"] > len(TEXT) + PICTURE_TOKENS
    assert tokens(output) == stock_tokens(stock, target, LENGTH)
