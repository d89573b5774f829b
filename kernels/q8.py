"""KV rounded to eight bits: half the bytes of 16-bit KV, and rows that can still be taken apart.

The format is Q8_0 of ggml: each 32 values of a row become one float16 scale and 32 int8, 34 bytes.
Rows are rounded for themselves, so that any of them can be read, borrowed and sent alone. Groups
within a row matter: a few channels of keys are a hundred times larger than the others (biases of
Qwen2.5), and take the precision of their own 31 neighbours only.
"""

from __future__ import annotations

import torch

_GROUP = 32
_BLOCK = 2 + _GROUP  # bytes


def packed_width(dim: int) -> int:
    """Bytes that `dim` values take, packed."""
    return -(-dim // _GROUP) * _BLOCK


def pack(values: torch.Tensor) -> torch.Tensor:
    """Round rows to eight bits.

    Args:
        values: ``[..., dim]`` float32, bfloat16 or float16.

    Returns:
        ``[..., packed_width(dim)]`` int8. The last group is filled up with zeros. The scale of a
        group with a value that is no number, or is beyond 65504 * 127, is none either.
    """
    dim = values.shape[-1]
    padded = torch.nn.functional.pad(values.float(), (0, -dim % _GROUP))
    groups = padded.unflatten(-1, (padded.shape[-1] // _GROUP, _GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    # By the scale as it is kept: rounding it moves no value by more than half a step.
    steps = torch.where(scales > 0, groups / scales.float(), 0).round_().clamp_(-127, 127)
    blocks = torch.cat([scales.view(torch.int8), steps.to(torch.int8)], dim=-1)
    return blocks.flatten(-2)


def unpack(packed: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The ``[..., dim]`` values of packed rows."""
    values = _blocks(packed)[..., 2:].to(torch.float32) * scales_of(packed).float()
    return values.flatten(-2)[..., :dim].to(dtype)


def scales_of(packed: torch.Tensor) -> torch.Tensor:
    """``[..., groups, 1]`` float16 scales of packed rows."""
    return _blocks(packed)[..., :2].contiguous().view(torch.float16)


def _blocks(packed: torch.Tensor) -> torch.Tensor:
    return packed.reshape(*packed.shape[:-1], packed.shape[-1] // _BLOCK, _BLOCK)
