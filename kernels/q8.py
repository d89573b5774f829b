"""KV rounded to eight bits: half the bytes of 16-bit KV, and rows that can still be taken apart.

The format is Q8_0 of ggml: each 32 values of a row become one float16 scale and 32 int8, 34 bytes.
Rows are rounded for themselves, so that any of them can be read, borrowed and sent alone.

A few channels of keys are a hundred times larger than the others (biases of Qwen2.5), and would
take the precision of their neighbours. So keys are divided first by a power of two for each
channel, which is exact, and which all rows of a request have in common (after KIVI, arXiv
2402.02750, which rounds keys by channel and values by token).
"""

from __future__ import annotations

import torch

_GROUP = 32
_BLOCK = 2 + _GROUP  # bytes


def packed_width(dim: int) -> int:
    """Bytes that `dim` values take, packed."""
    return -(-dim // _GROUP) * _BLOCK


def exponents_of(keys: torch.Tensor) -> torch.Tensor:
    """How large channels of ``[..., rows, dim]`` keys are: powers of two, ``[..., dim]`` int8."""
    if not keys.shape[-2]:
        return keys.new_zeros(keys.shape[:-2] + keys.shape[-1:], dtype=torch.int8)
    largest = keys.float().abs().amax(-2)
    return torch.frexp(largest).exponent.clamp_(-100, 100).to(torch.int8)


def pack(values: torch.Tensor, exponents: torch.Tensor | None = None) -> torch.Tensor:
    """Round rows to eight bits.

    Args:
        values: ``[..., rows, dim]`` float32, bfloat16 or float16.
        exponents: ``[..., dim]`` of their channels, see `exponents_of`; None: those of 1.

    Returns:
        ``[..., packed_width(dim)]`` int8. The last group is filled up with zeros. The scale of a
        group with a value that is no number, or is beyond 65504 * 127, is none either.
    """
    dim = values.shape[-1]
    values = values.float()
    if exponents is not None:
        values = torch.ldexp(values, -exponents[..., None, :].int())
    padded = torch.nn.functional.pad(values, (0, -dim % _GROUP))
    groups = padded.unflatten(-1, (padded.shape[-1] // _GROUP, _GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    # By the scale as it is kept: rounding it moves no value by more than half a step.
    steps = torch.where(scales > 0, groups / scales.float(), 0).round_().clamp_(-127, 127)
    blocks = torch.cat([scales.view(torch.int8), steps.to(torch.int8)], dim=-1)
    return blocks.flatten(-2)


def unpack(
    packed: torch.Tensor, dim: int, dtype: torch.dtype, exponents: torch.Tensor | None = None
) -> torch.Tensor:
    """The ``[..., rows, dim]`` values of packed rows; exponents: see `pack`."""
    values = _blocks(packed)[..., 2:].to(torch.float32) * scales_of(packed).float()
    values = values.flatten(-2)[..., :dim]
    if exponents is not None:
        values = torch.ldexp(values, exponents[..., None, :].int())
    return values.to(dtype)


def scales_of(packed: torch.Tensor) -> torch.Tensor:
    """``[..., groups, 1]`` float16 scales of packed rows."""
    return _blocks(packed)[..., :2].contiguous().view(torch.float16)


def _blocks(packed: torch.Tensor) -> torch.Tensor:
    return packed.reshape(*packed.shape[:-1], packed.shape[-1] // _BLOCK, _BLOCK)
