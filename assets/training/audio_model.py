"""The embedded audio model's parts: tokenizer, processor, configuration, a shorter encoder pass."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from kvshare_mm.assets.training.calls import TOPICS, random_call
from kvshare_mm.assets.training.speech import MAX_SECONDS, MAX_WORDS, RATE, WORDS, Clip
from kvshare_mm.assets.training.vl_model import SPLIT

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|audio_bos|>",
    "<|AUDIO|>",
    "<|audio_eos|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('audio', 'input_audio', 'audio_url') -%}"
    "{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
VOCABULARY = 768


def build_tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random("audio tokenizer")
    corpus = ["system", "user", "assistant"] * 100
    for index in range(3000):
        words = tuple(rng.choice(WORDS) for _ in range(rng.randint(1, MAX_WORDS)))
        call = random_call(rng, Clip(np.zeros(0), words, ()), TOPICS[index % len(TOPICS)])
        corpus += [call.system_text(), call.question_text(), call.answer()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Any:
    """Qwen2-Audio's own processor class with windows of 6 seconds in place of 30."""
    return Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(
            feature_size=64, sampling_rate=RATE, chunk_length=int(MAX_SECONDS)
        ),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any) -> Any:
    """Qwen2-Audio at about a million parameters."""
    token = tokenizer.convert_tokens_to_ids
    hidden = 96
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 64,
            "d_model": hidden,
            "encoder_layers": 3,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 288,
            "max_source_positions": int(MAX_SECONDS * 50),
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": (len(tokenizer) + 31) // 32 * 32,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        audio_token_index=token("<|AUDIO|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    places = model.model.audio_tower.embed_positions.weight
    with torch.no_grad():
        places.copy_(_sinusoids(*places.shape))
    return model


def encode(tower: Any, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The tower's output for batches that are shorter than its window, without the padding.

    Args:
        tower: a ``Qwen2AudioEncoder``.
        features: log-mel [B, mel, window].
        frames: int64 [B], frames with sound.

    Returns:
        Tokens [B, T, d_model], and how many of them each clip has [B].
    """
    longest = min(features.shape[-1], (int(frames.max()) + 7) // 4 * 4)
    x = functional.gelu(tower.conv1(features[..., :longest]))
    x = functional.gelu(tower.conv2(x)).transpose(1, 2)
    x = x + tower.embed_positions.weight[: x.shape[1]]
    halves = (frames - 1) // 2 + 1
    visible = torch.arange(x.shape[1])[None, :] < halves[:, None]
    mask = visible[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    for layer in tower.layers:
        x = layer(x, mask)
    x = tower.layer_norm(tower.avg_pooler(x.transpose(1, 2)).transpose(1, 2))
    return x, (halves - 2) // 2 + 1


def _sinusoids(length: int, channels: int) -> Tensor:
    steps = torch.exp(-math.log(10000) / (channels // 2 - 1) * torch.arange(channels // 2))
    angles = torch.arange(length)[:, None] * steps[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
