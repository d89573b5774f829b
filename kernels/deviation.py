# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Deviation in Triton: how far stored V (or K) is from what the context gives, per position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 16
NUM_WARPS = 4


@triton.jit
def deviation_kernel(
    new_ptr, stored_ptr, slots, out_ptr, num_tokens, num_heads, page_size,
    stride_nh, stride_nt, stride_sp, stride_sh, stride_st,
    DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of tokens. The norm runs over heads and channels, in float32."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, BLOCK_D)[None, :]
    exists = token < num_tokens
    inside = exists[:, None] & (dims < DIM)
    slot = tl.load(slots + token, mask=exists, other=0)
    stored_at = stored_ptr + slot // page_size * stride_sp + slot % page_size * stride_st
    new_at = new_ptr + token.to(tl.int64) * stride_nt
    total = tl.zeros([BLOCK_T], tl.float32)
    for head in range(num_heads):
        new = tl.load((new_at + head * stride_nh)[:, None] + dims, mask=inside, other=0.0)
        old = tl.load((stored_at + head * stride_sh)[:, None] + dims, mask=inside, other=0.0)
        difference = new.to(tl.float32) - old.to(tl.float32)
        total += tl.sum(difference * difference, 1)
    tl.store(out_ptr + token, tl.sqrt(total), mask=exists)


def deviation_constants(dim: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    return {"DIM": dim, "BLOCK_T": TOKENS, "BLOCK_D": triton.next_power_of_2(dim)}


def deviation_triton(new: torch.Tensor, stored: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`dispatch.deviation` on the GPU or in Triton's interpreter; checked there."""
    num_heads, num_tokens, dim = new.shape
    out = new.new_empty(num_tokens, dtype=torch.float32)
    if num_tokens:
        deviation_kernel[(triton.cdiv(num_tokens, TOKENS),)](
            new, stored, slots, out, num_tokens, num_heads, stored.shape[2],
            *new.stride()[:2], *stored.stride()[:3],
            **deviation_constants(dim), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out
