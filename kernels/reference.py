"""Slow and obvious: what every fast path is tested against."""

from __future__ import annotations

import torch

from kvshare_mm.kernels.edits import KVEdit
from kvshare_mm.kernels.scoring import PLAIN, Scoring


def partial_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    scale: float,
    scoring: Scoring = PLAIN,
    sees: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of queries at arbitrary token indices over all earlier keys, one query at a time.

    Args:
        query: ``[num_heads, n, head_dim]``.
        key: ``[num_kv_heads, num_tokens, head_dim]``; head h reads kv head
            ``h // (num_heads // num_kv_heads)``.
        value: ``[num_kv_heads, num_tokens, value_dim]``.
        index: ``[n]`` token index of each query; it sees keys ``0 .. index`` and no other, of those
            what the layer's window or chunk leaves.
        scale: factor on the scores.
        scoring: windows, sinks and capped scores of the layer.
        sees: ``[n]`` the last key that each query sees, from its own on; None: its own.

    Returns:
        ``[num_heads, n, value_dim]`` in the dtype of `query`; computed in float64.
    """
    num_heads, n, _ = query.shape
    group = num_heads // key.shape[0]
    out = query.new_empty(num_heads, n, value.shape[-1])
    for h in range(num_heads):
        for i in range(n):
            own = int(index[i])
            last = own if sees is None else int(sees[i])
            seen = [j for j in range(last + 1) if _sees(own, j, scoring)]
            scores = key[h // group, seen].double() @ query[h, i].double() * scale
            if scoring.softcap is not None:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            if scoring.sinks is not None:
                scores = torch.cat((scores, scoring.sinks[h : h + 1].double()))
            weights = scores.softmax(0)[: len(seen)]
            out[h, i] = (weights @ value[h // group, seen].double()).to(query.dtype)
    return out


def _sees(query: int, key: int, scoring: Scoring) -> bool:
    if scoring.window is not None:
        return query - key < scoring.window
    if scoring.chunk is not None:
        return query // scoring.chunk <= key // scoring.chunk
    return True


def gather_pages_reference(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """A request's tokens out of its pages, one behind the other.

    Args:
        pages: ``[num_pages, num_kv_heads, page_size, dim]``.
        block_table: ``[max_pages]`` the request's pages.

    Returns:
        ``[num_kv_heads, max_pages * page_size, dim]``.
    """
    return torch.cat([pages[int(page)] for page in block_table], dim=1)


def edit_kv_reference(
    source_key: torch.Tensor,
    source_value: torch.Tensor,
    target_key: torch.Tensor,
    target_value: torch.Tensor,
    edit: KVEdit,
) -> None:
    """`dispatch.edit_kv`, one pair of channels of one head of one token at a time, in float64."""
    layers, _, heads, from_size, dim_k = source_key.shape
    to_size = target_key.shape[3]
    pairs = edit.cos.shape[2]
    for token in range(edit.num_tokens):
        from_page, from_at = divmod(int(edit.source_slots[token]), from_size)
        to_page, to_at = divmod(int(edit.target_slots[token]), to_size)
        run = int(edit.run[token])
        for layer in range(layers):
            rotation = 0 if edit.rotation is None else int(edit.rotation[layer])
            for head in range(heads):
                old = source_key[layer, from_page, head, from_at].double()
                new = old.clone()
                for i in range(pairs):
                    a, b = (2 * i, 2 * i + 1) if edit.interleaved else (i, i + pairs)
                    cos, sin = (float(x[rotation, run, i]) for x in (edit.cos, edit.sin))
                    new[a] = old[a] * cos - old[b] * sin
                    new[b] = old[b] * cos + old[a] * sin
                assert len(new) == dim_k
                target_key[layer, to_page, head, to_at] = new.to(target_key.dtype)
                value = source_value[layer, from_page, head, from_at]
                target_value[layer, to_page, head, to_at] = value.to(target_value.dtype)
