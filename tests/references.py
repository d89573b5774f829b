"""What transformers itself computes: the references of the native engine's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache


@dataclass(frozen=True, slots=True)
class Full:
    """What a full prefill gives: ``logits [n, vocab]``, K and V ``[layers, heads, n, dim]``."""

    logits: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@torch.inference_mode()
def full(model: Any, inputs: Mapping[str, Any]) -> Full:
    cache = DynamicCache()  # made of a configuration, it drops what is behind windows
    logits = model(**inputs, past_key_values=cache, use_cache=True).logits[0]
    k, v = (torch.cat([getattr(x, n) for x in cache.layers]) for n in ("keys", "values"))
    return Full(logits, k, v)


@torch.inference_mode()
def greedy(model: Any, inputs: Mapping[str, Any], num_tokens: int) -> list[int]:
    """The answer, however it ends."""
    out = model.generate(
        **inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    answer: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


def text(token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Inputs of a prompt."""
    ids = torch.tensor([list(token_ids)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
