"""Slow and obvious: what every fast path is tested against."""

from __future__ import annotations

import torch


def partial_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of queries at arbitrary token indices over all earlier keys, one query at a time.

    Args:
        query: ``[num_heads, n, head_dim]``.
        key: ``[num_kv_heads, num_tokens, head_dim]``; head h reads kv head
            ``h // (num_heads // num_kv_heads)``.
        value: ``[num_kv_heads, num_tokens, value_dim]``.
        index: ``[n]`` token index of each query; it sees keys ``0 .. index`` and no other.
        scale: factor on the scores.

    Returns:
        ``[num_heads, n, value_dim]`` in the dtype of `query`; computed in float64.
    """
    num_heads, n, _ = query.shape
    group = num_heads // key.shape[0]
    out = query.new_empty(num_heads, n, value.shape[-1])
    for h in range(num_heads):
        for i in range(n):
            seen = int(index[i]) + 1
            scores = key[h // group, :seen].double() @ query[h, i].double() * scale
            out[h, i] = (scores.softmax(0) @ value[h // group, :seen].double()).to(query.dtype)
    return out
