"""Tiny random multimodal models in folders, with processors and chat templates of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.gemma3 import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen3_vl import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.utils import logging

_QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SEES = (*_QWEN_VL, "internvl", "gemma3", "qwen2_5_omni_thinker")
FAMILIES = (*SEES, "qwen2_audio")
FILMS = ("qwen2_vl", "qwen2_5_vl")
HEARS = ("qwen2_5_omni_thinker", "qwen2_audio")

_SPECIAL = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "start_image_token": "<|vision_start|>",
    "end_image_token": "<|vision_end|>",
    "context_image_token": "<|image_pad|>",
    "boi_token": "<|vision_start|>",
    "eoi_token": "<|vision_end|>",
}
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
}
_AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "d_model": 32,
}


def tokenizer(lines: int = 1) -> PreTrainedTokenizerFast:
    """A token a byte, and the special ones.

    Args:
        lines: so many line feeds behind one another are a token.
    """
    feeds = ["\u010a" * i for i in range(2, lines + 1)]
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *feeds]
    merges = [(feed[1:], feed[:1]) for feed in feeds]
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_SPECIAL.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_TEMPLATE,
        extra_special_tokens=_SPECIAL,
    )


def build(family: str, folder: Path, for_vllm: bool = False) -> None:
    """Save a random model of a family with its processor.

    Args:
        for_vllm: its CPU attention wants heads of 32 channels and more, its Qwen2-Audio clips of
            half a minute.
    """
    # Gemma's processor writes line feeds around a picture, which become one with those before.
    tok = tokenizer(lines=3 if family == "gemma3" else 1)
    ids = {
        name.removesuffix("_token"): tok.convert_tokens_to_ids(t) for name, t in _SPECIAL.items()
    }
    text = {**_TEXT, "vocab_size": len(tok), "eos_token_id": tok.eos_token_id}
    if for_vllm:
        text["hidden_size"] = 128
    seconds = 30 if for_vllm else 4
    text["pad_token_id"] = tok.pad_token_id
    ends = (("start", "bos"), ("end", "eos"))
    places = {f"{name}_token_id": ids[name] for name in ("image", "video")}
    places |= {f"vision_{name}_token_id": ids[f"vision_{short}"] for name, short in ends}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        audio = {**_AUDIO, "max_source_positions": 50 * seconds}
        model = _MODELS[family](text, places if family in _QWEN_VL else ids, audio)
        with torch.no_grad():
            # Fresh weights attend almost evenly, which would hide a wrong mask or rotation.
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.15)
    model.generation_config.eos_token_id = tok.eos_token_id
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    rename(folder / "model.safetensors", {"language_model.model.model.": "language_model.model."})
    _processor(family, tok, seconds).save_pretrained(folder)
    logging.enable_progress_bar()


def rename(file: Path, starts: dict[str, str]) -> None:
    """Give weights the names that published ones have: transformers saves some under others, which
    it reads too, and vLLM does not."""

    def named(name: str) -> str:
        for start, other in starts.items():
            if name.startswith(start):
                return other + name.removeprefix(start)
        return name

    save_file({named(n): w for n, w in load_file(file).items()}, file, {"format": "pt"})


def _processor(family: str, tok: Any, seconds: int) -> Any:
    pixels = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 24}
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen2VLVideoProcessor(**pixels)
    hears = WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)
    if family == "qwen2_vl":
        return Qwen2VLProcessor(images, tok, videos, chat_template=_TEMPLATE)
    if family == "qwen2_5_vl":
        return Qwen2_5_VLProcessor(images, tok, videos, chat_template=_TEMPLATE)
    if family == "qwen3_vl":
        images = Qwen2VLImageProcessor(min_pixels=64 * 64, max_pixels=32 * 32 * 24, patch_size=16)
        return Qwen3VLProcessor(images, tok, Qwen3VLVideoProcessor(), chat_template=_TEMPLATE)
    if family == "internvl":
        tiles = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=6)
        frames = InternVLVideoProcessor(size={"height": 28, "width": 28})
        # Its processor writes the tokens around a picture itself.
        template = _TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
        return InternVLProcessor(tiles, tok, frames, image_seq_length=4, chat_template=template)
    if family == "gemma3":
        pixels = {"size": {"height": 84, "width": 84}}
        template = _TEMPLATE.replace("<|image_pad|><|vision_end|>", "")
        return Gemma3Processor(
            Gemma3ImageProcessor(**pixels), tok, image_seq_length=36, chat_template=template
        )
    if family == "qwen2_5_omni_thinker":
        return Qwen2_5OmniProcessor(images, videos, hears, tok, chat_template=_TEMPLATE)
    return Qwen2AudioProcessor(hears, tok, chat_template=_TEMPLATE)


def _mrope(text: dict[str, Any]) -> dict[str, Any]:
    pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    time, side = pairs // 4, pairs * 3 // 8
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [time, side, side]}


def _qwen2_vl(text: dict[str, Any], places: dict[str, int], _: Any) -> Any:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**text, "rope_parameters": _mrope(text)},
            vision_config={**vision, "hidden_size": text["hidden_size"]},
            **places,
        )
    )


_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}


def _qwen2_5_vl(text: dict[str, Any], places: dict[str, int], _: Any) -> Any:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": _mrope(text)},
            vision_config={**_VISION, "out_hidden_size": text["hidden_size"]},
            **places,
        )
    )


def _qwen3_vl(text: dict[str, Any], places: dict[str, int], _: Any) -> Any:
    vision = {**_VISION, "depth": 3, "deepstack_visual_indexes": [0, 1], "patch_size": 16}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                **text,
                "head_dim": text["hidden_size"] // text["num_attention_heads"],
                "rope_parameters": {**_mrope(text), "mrope_interleaved": True},
            },
            vision_config={
                **vision,
                "num_position_embeddings": 64,
                "out_hidden_size": text["hidden_size"],
            },
            **places,
        )
    )


def _internvl(text: dict[str, Any], ids: dict[str, int], _: Any) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [7, 7],
    }
    return InternVLForConditionalGeneration(
        InternVLConfig(
            text_config={**text, "model_type": "qwen2"},
            vision_config=vision,
            image_token_id=ids["image"],
        )
    )


def _gemma3(text: dict[str, Any], ids: dict[str, int], _: Any) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 84,
        "patch_size": 7,
    }
    sizes = {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16}
    layers = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            # Shorter than prompts, and longer than a picture, as it is in those there are.
            text_config={**text, **sizes, "layer_types": layers, "sliding_window": 48},
            vision_config=vision,
            mm_tokens_per_image=36,
            image_token_index=ids["image"],
            boi_token_index=ids["boi"],
            eoi_token_index=ids["eoi"],
        )
    )


def _omni(text: dict[str, Any], ids: dict[str, int], audio: dict[str, Any]) -> Any:
    return Qwen2_5OmniThinkerForConditionalGeneration(
        Qwen2_5OmniThinkerConfig(
            audio_config={**audio, "output_dim": text["hidden_size"]},
            vision_config={**_VISION, "out_hidden_size": text["hidden_size"]},
            text_config={**text, "rope_parameters": _mrope(text)},
            audio_token_index=ids["audio"],
            image_token_index=ids["image"],
            video_token_index=ids["video"],
            audio_start_token_id=ids["audio_bos"],
            audio_end_token_id=ids["audio_eos"],
            vision_start_token_id=ids["vision_bos"],
            vision_end_token_id=ids["vision_eos"],
        )
    )


def _qwen2_audio(text: dict[str, Any], ids: dict[str, int], audio: dict[str, Any]) -> Any:
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config={**audio, "model_type": "qwen2_audio_encoder"},
            text_config={**text, "model_type": "qwen2"},
            audio_token_index=ids["audio"],
        )
    )


_MODELS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "qwen2_5_omni_thinker": _omni,
    "qwen2_audio": _qwen2_audio,
}
