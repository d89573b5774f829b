# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The KV edit in Triton: gather, re-rotate and scatter in one pass over memory.

Every kept token's K and V are read once and written once, whatever lies between: no gathered copy,
no rotated copy. All layers of a tensor are one launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvshare_mm.kernels.edits import KVEdit

TOKENS = 16  # a program moves so many tokens of one head and layer
NUM_WARPS = 4


@triton.jit
def edit_kv_kernel(
    from_k, from_v, to_k, to_v, source_slots, target_slots, run_ptr, rotation_ptr, cos_ptr, sin_ptr,
    num_tokens, source_page_size, target_page_size, stride_rotation,
    stride_fkl, stride_fkp, stride_fkh, stride_fkt, stride_fvl, stride_fvp, stride_fvh, stride_fvt,
    stride_tkl, stride_tkp, stride_tkh, stride_tkt, stride_tvl, stride_tvp, stride_tvh, stride_tvt,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BY_LAYER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of tokens, KV heads, layers."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    exists = token < num_tokens
    source = tl.load(source_slots + token, mask=exists, other=0)
    target = tl.load(target_slots + token, mask=exists, other=0)
    source_page, source_at = source // source_page_size, source % source_page_size
    target_page, target_at = target // target_page_size, target % target_page_size
    k_in = from_k + layer * stride_fkl + head * stride_fkh
    k_in = (k_in + source_page * stride_fkp + source_at * stride_fkt)[:, None]
    k_out = to_k + layer * stride_tkl + head * stride_tkh
    k_out = (k_out + target_page * stride_tkp + target_at * stride_tkt)[:, None]

    if PAIRS > 0:
        pair = tl.arange(0, BLOCK_P)[None, :]
        turned = exists[:, None] & (pair < PAIRS)
        run = tl.load(run_ptr + token, mask=exists, other=0)
        angle = run[:, None] * PAIRS + pair
        if BY_LAYER:
            angle += tl.load(rotation_ptr + layer).to(tl.int64) * stride_rotation
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        if INTERLEAVED:
            # One wide access and a split in registers: every second channel would be a slow one.
            both = tl.arange(0, 2 * BLOCK_P)[None, :]
            inside = exists[:, None] & (both < 2 * PAIRS)
            x = tl.load(k_in + both, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_P, 2]))
            y = tl.join(a * cos - b * sin, b * cos + a * sin)
            y = tl.reshape(y, [BLOCK_T, 2 * BLOCK_P])
            tl.store(k_out + both, y.to(to_k.dtype.element_ty), mask=inside)
        else:
            a = tl.load(k_in + pair, mask=turned, other=0.0).to(tl.float32)
            b = tl.load(k_in + PAIRS + pair, mask=turned, other=0.0).to(tl.float32)
            first, second = a * cos - b * sin, b * cos + a * sin
            tl.store(k_out + pair, first.to(to_k.dtype.element_ty), mask=turned)
            tl.store(k_out + PAIRS + pair, second.to(to_k.dtype.element_ty), mask=turned)
    if 2 * PAIRS < DIM_K:
        rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        inside = exists[:, None] & (rest < DIM_K)
        x = tl.load(k_in + rest, mask=inside, other=0.0).to(tl.float32)
        tl.store(k_out + rest, x.to(to_k.dtype.element_ty), mask=inside)

    dims = tl.arange(0, BLOCK_DV)[None, :]
    inside = exists[:, None] & (dims < DIM_V)
    v_in = from_v + layer * stride_fvl + head * stride_fvh
    v_in = (v_in + source_page * stride_fvp + source_at * stride_fvt)[:, None]
    v_out = to_v + layer * stride_tvl + head * stride_tvh
    v_out = (v_out + target_page * stride_tvp + target_at * stride_tvt)[:, None]
    v = tl.load(v_in + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(v_out + dims, v.to(to_v.dtype.element_ty), mask=inside)


def edit_constants(
    dim_k: int, dim_v: int, pairs: int, interleaved: bool, by_layer: bool = False
) -> dict[str, Any]:
    """What the kernel is compiled for; `pairs` is half of the rotary dimensions."""
    return {
        "DIM_K": dim_k,
        "DIM_V": dim_v,
        "PAIRS": pairs,
        "INTERLEAVED": interleaved,
        "BY_LAYER": by_layer,
        "BLOCK_T": TOKENS,
        "BLOCK_P": triton.next_power_of_2(max(1, pairs)),
        "BLOCK_REST": triton.next_power_of_2(max(1, dim_k - 2 * pairs)),
        "BLOCK_DV": triton.next_power_of_2(dim_v),
    }


def edit_kv_triton(
    source_key: torch.Tensor,
    source_value: torch.Tensor,
    target_key: torch.Tensor,
    target_value: torch.Tensor,
    edit: KVEdit,
) -> None:
    """`dispatch.edit_kv` on the GPU or in Triton's interpreter; checked there."""
    layers, _, heads, page_size, dim_k = source_key.shape
    dim_v = source_value.shape[4]
    if not edit.num_tokens:
        return
    edit_kv_kernel[(triton.cdiv(edit.num_tokens, TOKENS), heads, layers)](
        source_key, source_value, target_key, target_value,
        edit.source_slots, edit.target_slots, edit.run,
        edit.run if edit.rotation is None else edit.rotation, edit.cos, edit.sin,
        edit.num_tokens, page_size, target_key.shape[3], edit.cos.stride(0),
        *source_key.stride()[:4], *source_value.stride()[:4],
        *target_key.stride()[:4], *target_value.stride()[:4],
        **edit_constants(
            dim_k, dim_v, edit.cos.shape[2], edit.interleaved, edit.rotation is not None
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
