"""A Qwen2.5-VL of random weights in the proportions of the real 3B model, for timing.

Its answers mean nothing. What its vision tower costs beside its text part is what it is for: both
are the 3B model's with every width and depth divided by one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and depths of a Qwen2.5-VL."""

    text_hidden: int
    text_layers: int
    text_mlp: int
    heads: int
    kv_heads: int
    vision_hidden: int
    vision_depth: int
    vision_mlp: int
    vision_heads: int
    window: int = 112

    @property
    def full_blocks(self) -> list[int]:
        """Blocks of the tower whose attention sees the whole picture: every fourth part's last."""
        part = self.vision_depth // 4
        return [part * (i + 1) - 1 for i in range(4)]

    @property
    def text_macs(self) -> float:
        """Multiply-adds of the text layers for a token, attention's own left out."""
        head = self.text_hidden // self.heads
        attention = 2 * self.text_hidden**2 + 2 * self.text_hidden * self.kv_heads * head
        return self.text_layers * (attention + 3 * self.text_hidden * self.text_mlp)

    @property
    def vision_macs(self) -> float:
        """The same of the tower, for the four patches of an image token."""
        block = 4 * self.vision_hidden**2 + 3 * self.vision_hidden * self.vision_mlp
        merger = (4 * self.vision_hidden) * (4 * self.vision_hidden + self.text_hidden)
        return 4 * self.vision_depth * block + merger

    def divided(self, by: int) -> Shape:
        """Every width and depth divided; head sizes stay."""
        return Shape(
            self.text_hidden // by,
            self.text_layers // by,
            self.text_mlp // by,
            self.heads // by,
            max(1, self.kv_heads // by),
            self.vision_hidden // by,
            self.vision_depth // by,
            self.vision_mlp // by,
            self.vision_heads // by,
        )


# Qwen/Qwen2.5-VL-3B-Instruct, from its published configuration.
QWEN25_VL_3B = Shape(2048, 36, 11008, 16, 2, 1280, 32, 3420, 16)


def build(folder: Path, shape: Shape, max_pixels: int) -> None:
    """Save a model of a shape with its processor, a token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_SPECIAL.values()])
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", extra_special_tokens=_SPECIAL
    )
    pixels = {"min_pixels": 28 * 28 * 4, "max_pixels": max_pixels}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels),
        tokenizer,
        Qwen2VLVideoProcessor(**pixels),
        chat_template=_TEMPLATE,
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.text_hidden,
        "num_hidden_layers": shape.text_layers,
        "intermediate_size": shape.text_mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 8192,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": shape.vision_hidden,
        "depth": shape.vision_depth,
        "intermediate_size": shape.vision_mlp,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.text_hidden,
        "window_size": shape.window,
        "fullatt_block_indexes": shape.full_blocks,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(_SPECIAL["image_token"]),
        video_token_id=tokenizer.convert_tokens_to_ids(_SPECIAL["video_token"]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    logging.enable_progress_bar()
