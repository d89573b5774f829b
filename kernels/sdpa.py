"""The torch path: the same operations with what torch has, for CPUs and as a fallback.

`partial_attention` cuts the queries into chunks of at most `ragged.CHUNK`, each over the keys from
the first that it sees to its own last index, with a mask only as large as that. One call with a
mask ``[queries, keys]`` for all computes every score above the diagonal too; one call for every
contiguous run pays for calls when runs are short. Figures: README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvshare_mm.kernels.edits import KVEdit
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.kernels.scoring import PLAIN, Scoring


def partial_attention_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: RaggedQueries,
    scale: float,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """`dispatch.partial_attention`, chunk by chunk."""
    rows = query.transpose(0, 1)[None]
    outputs = []
    source = _Source(key, value, batch)
    masks = batch.masks(query.dtype, scoring)
    for chunk, mask in zip(batch.chunks(scoring), masks, strict=True):
        q = rows[:, :, chunk.start : chunk.end]
        k, v = source.of(chunk.request, chunk.first_key, chunk.kv_len)
        if not scoring.fused:
            outputs.append(_scored(q[0], k[0], v[0], mask, scale, scoring)[None])
            continue
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=chunk.causal and chunk.kv_len > 1,
                scale=scale,
                enable_gqa=True,
            )
        )
    if not outputs:
        return query.new_empty(0, query.shape[1], value.shape[3])
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out[0].transpose(0, 1)


def _scored(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention whose scores are written out: ``[num_heads, n, value_dim]``."""
    heads, n, _ = q.shape
    grouped = (q * scale).reshape(k.shape[0], -1, q.shape[-1])
    scores = torch.matmul(grouped, k.transpose(1, 2)).view(heads, n, -1).float()
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        scores = scores + mask
    if scoring.sinks is not None:
        scores = torch.cat((scores, scoring.sinks.float()[:, None, None].expand(-1, n, 1)), -1)
    weights = scores.softmax(-1)[..., : k.shape[1]].to(v.dtype)
    return torch.matmul(weights.view(k.shape[0], -1, k.shape[1]), v).view(heads, n, -1)


def edit_kv_torch(
    source_key: torch.Tensor,
    source_value: torch.Tensor,
    target_key: torch.Tensor,
    target_value: torch.Tensor,
    edit: KVEdit,
) -> None:
    """`dispatch.edit_kv` with gathered and rotated copies."""
    from_page, from_at = _split(edit.source_slots, source_key.shape[3])
    to_page, to_at = _split(edit.target_slots, target_key.shape[3])
    k = source_key[:, from_page, :, from_at].float()  # [tokens, layers, heads, dim]
    pairs = edit.cos.shape[2]
    layers = [0] if edit.rotation is None else edit.rotation.long()
    # [tokens, layers or 1, 1, pairs]
    cos, sin = (
        table[layers][:, edit.run.long()].transpose(0, 1)[:, :, None]
        for table in (edit.cos, edit.sin)
    )
    a_at = slice(0, 2 * pairs, 2) if edit.interleaved else slice(0, pairs)
    b_at = slice(1, 2 * pairs, 2) if edit.interleaved else slice(pairs, 2 * pairs)
    a, b = k[..., a_at].clone(), k[..., b_at].clone()
    k[..., a_at] = a * cos - b * sin
    k[..., b_at] = b * cos + a * sin
    target_key[:, to_page, :, to_at] = k.to(target_key.dtype)
    v = source_value[:, from_page, :, from_at]
    target_value[:, to_page, :, to_at] = v.to(target_value.dtype)


class _Source:
    """K/V of one request at a time, ``[1, num_kv_heads, keys, dim]``; views if contiguous."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, batch: RaggedQueries) -> None:
        self._kv = key, value
        self._batch = batch
        self._gathered: tuple[int, tuple[torch.Tensor, ...]] | None = None

    def of(self, request: int, first: int, end: int) -> tuple[torch.Tensor, ...]:
        if self._batch.pages is not None:
            page = self._batch.pages[request]
            return tuple(x[page : page + 1, :, first:end] for x in self._kv)
        if self._gathered is None or self._gathered[0] != request:
            page_size = self._kv[0].shape[2]
            num_pages = -(-self._batch.kv_lens[request] // page_size)
            pages = self._batch.block_table[request, :num_pages].long()
            self._gathered = (
                request,
                tuple(x[pages].transpose(0, 1).flatten(1, 2)[None] for x in self._kv),
            )
        return tuple(x[:, :, first:end] for x in self._gathered[1])


def _split(slots: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return slots // page_size, slots % page_size
