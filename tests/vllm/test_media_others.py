"""Media that the native engine does not take: vLLM tells where they are, which is enough."""

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
TEXT = "Sort this parcel by its sender, then say to which of our two warehouses it goes. "


def llava(made: Path) -> None:
    """Positions one behind the other."""
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
                image_seq_length=16,
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


def qwen(made: Path) -> None:
    """M-RoPE; its videos are laid out by vLLM itself."""
    media_models.build("qwen2_5_vl", made, for_vllm=True)


# What makes a model, the medium, what stands for it, and the positions that it takes.
MODELS = {
    "llava": (llava, "image", "<|image_pad|>", 16),
    "video": (qwen, "video", "<|video_pad|>", 2 * 2 * 3),
}
Made = tuple[Path, str]


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param][0](folder)
    return folder, request.param


@pytest.fixture(scope="module")
def engine(made: Made) -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 1}
    with shared_engine(made[0], options, max_model_len=512) as started:
        yield started


@pytest.fixture(scope="module")
def stock(made: Made) -> Iterator[Any]:
    with stock_engine(made[0], max_model_len=512) as started:
        yield started


def prompt(name: str, *parts: str | int) -> dict[str, Any]:
    """Text, and media by their numbers."""
    _, modality, token, _ = MODELS[name]
    tok, ids, media = media_models.tokenizer(), [], []
    for part in parts:
        if isinstance(part, str):
            ids += tok.encode(part)
        else:
            ids.append(tok.convert_tokens_to_ids(token))
            frames = np.random.default_rng(part).integers(0, 256, (4, 56, 84, 3), np.uint8)
            times = {"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
            video = (frames, {**times, "duration": 2.0, "do_sample_frames": False})
            media.append(video if modality == "video" else Image.fromarray(frames[0]))
    return {"prompt_token_ids": ids, "multi_modal_data": {modality: media}}


@pytest.fixture(autouse=True)
def fresh(engine: Shared) -> Iterator[None]:
    engine.forget()
    with engine.keeping_its_blocks():
        yield


def test_a_medium_that_moved_is_kept(engine: Shared, made: Made) -> None:
    _, name = made
    engine.serve(prompt(name, "Tom: ", 1, TEXT), LENGTH)
    target = prompt(name, "From Alexandra: ", 1, TEXT)
    use = summary(engine.serve(target, LENGTH, repair="tail:16"))
    taken = MODELS[name][3]
    assert use["reused"] > taken + 40
    computed = use["exact"] + use["reused"] + use["recomputed"]
    assert computed == len(target["prompt_token_ids"]) - 1 + taken


def test_a_new_medium_is_computed(engine: Shared, made: Made) -> None:
    _, name = made
    engine.serve(prompt(name, TEXT, 1, TEXT), LENGTH)
    use = summary(engine.serve(prompt(name, TEXT, 2, TEXT), LENGTH, repair="tail:16"))
    assert use["exact"] == len(TEXT) and not use["reused"]
    assert use["declined"] == "new_picture"


def test_what_is_exact_gives_the_answer_of_stock_vllm(
    engine: Shared, stock: Any, made: Made
) -> None:
    _, name = made
    engine.serve(prompt(name, TEXT, 1, TEXT), LENGTH)
    assert engine.llm.reset_prefix_cache()
    target = prompt(name, TEXT, 1, "Sort them by weight. " + TEXT)
    output = engine.serve(target, LENGTH, reuse="exact")
    assert summary(output)["exact"] > len(TEXT) + MODELS[name][3]
    assert tokens(output) == stock_tokens(stock, target, LENGTH)
