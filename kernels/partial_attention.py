# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""PartialAttention in Triton: queries at arbitrary token indices over paged or contiguous K/V.

A flash-style kernel: tiles of queries walk over tiles of keys with an online softmax, and nothing
of size queries x keys is ever stored. It differs from a varlen causal kernel in one thing: what a
query may see is decided by its token index, which the kernel loads, and not by its row.

- The heads that share a KV head are rows of one tile, so K and V are read once for all of them.
- Indices ascend, so a tile's last row bounds the keys to visit, and keys up to its first row's
  index need no mask. For a contiguous run that is exactly the work of a causal prefill.
- Rows of a picture may see up to its end. That never falls from row to row, so it is all that is
  told; only where a layer bounds the keys from below too, rows need their own index beside it.
- A window bounds the keys from below too; sinks are where the softmax's sums begin.
- Few queries over a long context would leave most of a GPU idle: the keys are then split over
  programs, and `combine_kernel` joins the parts by their log-sum-exp (base 2).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvshare_mm.kernels.backend import interpreting
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.kernels.scoring import PLAIN, Scoring
from kvshare_mm.kernels.tiles import Tile, block_dim

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _first_tile(cu_seqlens_q, request, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    # Needs no table of tiles: one more than enough for every request, known from cu_seqlens_q.
    return tl.load(cu_seqlens_q + request) * GROUP // BLOCK_M + request


@triton.jit
def _request_of_tile(cu_seqlens_q, tile, num_requests, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    low = 0
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if _first_tile(cu_seqlens_q, middle, GROUP, BLOCK_M) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _pages(table, start, offsets, seen, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page and offset in it of the tokens of a key tile; PAGE_SIZE 0 means one page for all."""
    if PAGE_SIZE == 0:
        page = tl.load(table).to(tl.int64)
        within = offsets
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table + start // PAGE_SIZE).to(tl.int64)
        within = offsets % PAGE_SIZE
    else:
        page = tl.load(table + offsets // PAGE_SIZE, mask=offsets < seen, other=0).to(tl.int64)
        within = offsets % PAGE_SIZE
    return page, within


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _attend(
    acc, total, peak, q, index, last_key, k_head, v_head, table, begin, end, seen,
    scale_log2, softcap, stride_kp, stride_kt, stride_vp, stride_vt,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAPPED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile over the keys ``[begin, end)``."""
    dims_k = tl.arange(0, BLOCK_DK)
    dims_v = tl.arange(0, BLOCK_DV)
    for start in range(begin, end, BLOCK_N):
        offsets = start + tl.arange(0, BLOCK_N)
        page, within = _pages(table, start, offsets, seen, PAGE_SIZE, BLOCK_N)
        k_at = k_head + page * stride_kp + within * stride_kt
        v_at = v_head + page * stride_vp + within * stride_vt
        if MASKED:
            # What no query of the tile may see is not even loaded: 0 * NaN is NaN.
            exists = offsets < seen
            if DIM_K == BLOCK_DK:
                k = tl.load(k_at[None, :] + dims_k[:, None], mask=exists[None, :], other=0.0)
            else:
                inside = exists[None, :] & (dims_k[:, None] < DIM_K)
                k = tl.load(k_at[None, :] + dims_k[:, None], mask=inside, other=0.0)
        elif DIM_K == BLOCK_DK:
            k = tl.load(k_at[None, :] + dims_k[:, None])
        else:
            k = tl.load(k_at[None, :] + dims_k[:, None], mask=dims_k[:, None] < DIM_K, other=0.0)
        scores = _dot(q, k, None, PRECISION, WIDEN) * scale_log2
        if CAPPED:
            # tanh by its exponential, which overflows to the right ends; in natural units.
            x = scores * (2.0 / softcap)
            scores = softcap * _LOG2E * (1.0 - 2.0 / (tl.math.exp2(x) + 1.0))
        if MASKED:
            visible = last_key[:, None] >= offsets[None, :]
            if WINDOW > 0:
                visible = visible & (offsets[None, :] > index[:, None] - WINDOW)
            if CHUNK > 0:
                visible = visible & (offsets[None, :] >= (index // CHUNK * CHUNK)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        if MASKED:
            # A row that has seen no key yet: -inf - -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            base = new_peak
        p = tl.math.exp2(scores - base[:, None])
        decay = tl.math.exp2(peak - base)
        total = total * decay + tl.sum(p, 1)
        if MASKED:
            if DIM_V == BLOCK_DV:
                v = tl.load(v_at[:, None] + dims_v[None, :], mask=exists[:, None], other=0.0)
            else:
                inside = exists[:, None] & (dims_v[None, :] < DIM_V)
                v = tl.load(v_at[:, None] + dims_v[None, :], mask=inside, other=0.0)
        elif DIM_V == BLOCK_DV:
            v = tl.load(v_at[:, None] + dims_v[None, :])
        else:
            v = tl.load(v_at[:, None] + dims_v[None, :], mask=dims_v[None, :] < DIM_V, other=0.0)
        acc = _dot(p.to(v.dtype), v, acc * decay[:, None], PRECISION, WIDEN)
        peak = new_peak
    return acc, total, peak


@triton.jit
def partial_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, index_ptr, last_key_ptr, cu_seqlens_q,
    block_table, num_requests, num_heads, scale_log2, softcap,
    stride_qt, stride_qh, stride_kp, stride_kh, stride_kt, stride_vp, stride_vh, stride_vt,
    stride_os, stride_ot, stride_oh, stride_ls, stride_table,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows (a row is a query and a head of the group), KV heads, splits."""
    # The last tiles have the longest way: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    request = _request_of_tile(cu_seqlens_q, tile, num_requests, GROUP, BLOCK_M)
    q_start = tl.load(cu_seqlens_q + request)
    num_rows = (tl.load(cu_seqlens_q + request + 1) - q_start) * GROUP
    first_row = (tile - _first_tile(cu_seqlens_q, request, GROUP, BLOCK_M)) * BLOCK_M
    if first_row < num_rows:
        rows = first_row + tl.arange(0, BLOCK_M)
        valid = rows < num_rows
        token = (q_start + rows // GROUP).to(tl.int64)
        head = kv_head * GROUP + rows % GROUP
        index = tl.load(index_ptr + token, mask=valid, other=-1)
        last_key = index
        if AHEAD:
            last_key = tl.load(last_key_ptr + token, mask=valid, other=-1)
        last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
        seen = tl.load(last_key_ptr + q_start + last_row // GROUP) + 1
        by_all = tl.load(index_ptr + q_start + first_row // GROUP) + 1

        dims_k = tl.arange(0, BLOCK_DK)
        q_at = q_ptr + token * stride_qt + head * stride_qh
        inside = valid[:, None] & (dims_k[None, :] < DIM_K)
        q = tl.load(q_at[:, None] + dims_k[None, :], mask=inside, other=0.0)

        # Keys before the first that the first row sees are not visited.
        low = 0
        if WINDOW > 0:
            low = tl.maximum(0, by_all - WINDOW) // BLOCK_N * BLOCK_N
        if CHUNK > 0:
            low = (by_all - 1) // CHUNK * CHUNK // BLOCK_N * BLOCK_N
        per_split = tl.cdiv(tl.cdiv(seen - low, BLOCK_N), NUM_SPLITS) * BLOCK_N
        begin = low + split * per_split
        end = tl.minimum(begin + per_split, seen)

        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * _LOG2E
            counts = NUM_SPLITS == 1 or split == 0
            peak = tl.where(counts, sink, peak)
            total = tl.where(counts, 1.0, total)
        k_head = k_ptr + kv_head * stride_kh
        v_head = v_ptr + kv_head * stride_vh
        table = block_table + request * stride_table
        masked_from = begin
        if (WINDOW == 0) & (CHUNK == 0):
            masked_from = tl.maximum(begin, tl.minimum(end, by_all // BLOCK_N * BLOCK_N))
            acc, total, peak = _attend(
                acc, total, peak, q, index, last_key, k_head, v_head, table, begin, masked_from,
                seen, scale_log2, softcap, stride_kp, stride_kt, stride_vp, stride_vt,
                False, WINDOW, CHUNK, CAPPED, PAGE_SIZE, DIM_K, DIM_V, BLOCK_N, BLOCK_DK,
                BLOCK_DV, PRECISION, WIDEN,
            )  # fmt: skip
        acc, total, peak = _attend(
            acc, total, peak, q, index, last_key, k_head, v_head, table, masked_from, end, seen,
            scale_log2, softcap, stride_kp, stride_kt, stride_vp, stride_vt,
            True, WINDOW, CHUNK, CAPPED, PAGE_SIZE, DIM_K, DIM_V, BLOCK_N, BLOCK_DK, BLOCK_DV,
            PRECISION, WIDEN,
        )  # fmt: skip

        # A row without a key in this split gives 0, and a log-sum-exp of -inf + log2(1).
        total = tl.where(total == 0.0, 1.0, total)
        acc = acc / total[:, None]
        dims_v = tl.arange(0, BLOCK_DV)
        out_at = out_ptr + split * stride_os + token * stride_ot + head * stride_oh
        tl.store(
            out_at[:, None] + dims_v[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & (dims_v[None, :] < DIM_V),
        )
        if NUM_SPLITS > 1:
            lse = peak + tl.math.log2(total)
            tl.store(lse_ptr + split * stride_ls + token * num_heads + head, lse, mask=valid)


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr,
    stride_ps, stride_ls,
    NUM_SPLITS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one query and head, which is the program id; `out` is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_DV)
    peak = tl.load(lse_ptr + row)
    for split in tl.static_range(1, NUM_SPLITS):
        peak = tl.maximum(peak, tl.load(lse_ptr + split * stride_ls + row))
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = 0.0
    for split in tl.static_range(NUM_SPLITS):
        # exp2(-inf) = 0: a split in which this query sees no key.
        weight = tl.math.exp2(tl.load(lse_ptr + split * stride_ls + row) - peak)
        part = tl.load(part_ptr + split * stride_ps + row * DIM_V + dims, mask=dims < DIM_V)
        acc += weight * part
        total += weight
    tl.store(
        out_ptr + row * DIM_V + dims,
        (acc / total).to(out_ptr.dtype.element_ty),
        mask=dims < DIM_V,
    )


def attention_constants(
    tile: Tile,
    dtype: torch.dtype,
    *,
    group: int,
    page_size: int,
    dim_k: int,
    dim_v: int,
    num_splits: int,
    scoring: Scoring = PLAIN,
    ahead: bool = False,
) -> dict[str, Any]:
    """What `partial_attention_kernel` is compiled for; `page_size` 0 means one page per request.
    With `ahead`, some queries see keys behind their own.

    float32 is there for exactness: TF32 would lose 13 of its 24 bits. The interpreter multiplies
    the bit patterns of bfloat16 as if they were integers, so it gets float32.
    """
    return {
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "DIM_K": dim_k,
        "DIM_V": dim_v,
        "NUM_SPLITS": num_splits,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_DK": block_dim(dim_k),
        "BLOCK_DV": block_dim(dim_v),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "WIDEN": dtype == torch.bfloat16 and interpreting(),
        "WINDOW": scoring.span[0],
        "CHUNK": scoring.span[1],
        "CAPPED": scoring.softcap is not None,
        "SINKS": scoring.sinks is not None,
        "AHEAD": ahead and scoring.span != PLAIN.span,
    }


def combine_constants(num_splits: int, dim_v: int) -> dict[str, Any]:
    """What `combine_kernel` is compiled for."""
    return {"NUM_SPLITS": num_splits, "DIM_V": dim_v, "BLOCK_DV": block_dim(dim_v)}


def partial_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: RaggedQueries,
    scale: float,
    tile: Tile,
    num_splits: int = 1,
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """`dispatch.partial_attention` on the GPU or in Triton's interpreter; checked there.

    Args:
        tile: see `tiles.attention_tiles`.
        num_splits: over how many programs the keys of a query tile are spread.
        scoring: windows, sinks and capped scores of the layer.

    Returns:
        ``[num_queries, num_heads, value_dim]`` in the dtype of `query`.
    """
    num_queries, num_heads, dim_k = query.shape
    num_kv_heads, dim_v = key.shape[1], value.shape[3]
    group = num_heads // num_kv_heads
    page_size = 0 if batch.block_table.shape[1] == 1 else key.shape[2]
    out = query.new_empty(num_queries, num_heads, dim_v)
    if not num_queries:
        return out
    parts = out[None]
    if num_splits > 1:
        parts = query.new_empty(num_splits, *out.shape, dtype=torch.float32)
    lse = query.new_empty(num_splits, num_queries, num_heads, dtype=torch.float32)
    # Without a bound from below, a query is no more than what it sees.
    index = batch.index if scoring.span != PLAIN.span else batch.last_key
    num_tiles = num_queries * group // tile.block_m + batch.num_requests
    partial_attention_kernel[(num_tiles, num_kv_heads, num_splits)](
        query, key, value, parts, lse, lse if scoring.sinks is None else scoring.sinks,
        index, batch.last_key, batch.cu_seqlens_q, batch.block_table,
        batch.num_requests, num_heads, scale * _LOG2E.value, scoring.softcap or 0.0,
        *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
        *parts.stride()[:3], lse.stride(0), batch.block_table.stride(0),
        **attention_constants(
            tile, query.dtype, group=group, page_size=page_size, dim_k=dim_k, dim_v=dim_v,
            num_splits=num_splits, scoring=scoring, ahead=batch.sees is not None,
        ),
        **tile.launch_options(torch.version.hip is None),
    )  # fmt: skip
    if num_splits > 1:
        combine_kernel[(num_queries * num_heads,)](
            parts, lse, out, parts.stride(0), lse.stride(0),
            **combine_constants(num_splits, dim_v), num_warps=1,
        )  # fmt: skip
    return out
