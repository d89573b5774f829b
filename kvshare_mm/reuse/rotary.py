"""Re-rotation of keys: move a cached key from one position to another.

RoPE rotates pair ``i`` of a key at position ``p`` by ``p * inv_freq[i]``. Rotations add up, so a
key moves from ``p`` to ``p + d`` by rotating it ``d * inv_freq[i]`` further, whatever factor the
model multiplied in (YaRN's attention factor stays as it is). This holds for every RoPE type whose
``inv_freq`` does not depend on the sequence length: default, linear, llama3, YaRN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The last two are YaRN as vLLM calls it in the configuration of a DeepSeek that it has loaded.
SUPPORTED_ROPE_TYPES = frozenset(
    {"default", "linear", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
)


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """How a model rotates its keys.

    Attributes:
        inv_freq: ``[num_rotations, rotary_dim / 2]`` float32 angles per position. Channels beyond
            ``rotary_dim`` are not rotated. A layer that rotates nothing has a row of zeros.
        interleaved: pairs are neighbours ``(2i, 2i + 1)`` (GPT-J) and not halves
            ``(i, i + rotary_dim / 2)`` (Llama).
        layers: which row of `inv_freq` each layer turns by; None: the first, in every layer.
        axes: on which axis of a position each pair turns (M-RoPE): 0 time, 1 row, 2 column; None:
            that is not known, and all axes of what is moved must move alike.
        of_values: what is rotated lies where other models keep their values: multi-head latent
            attention keeps the latent first and the keys' rotated part second.
    """

    inv_freq: torch.Tensor
    interleaved: bool = False
    layers: tuple[int, ...] | None = None
    of_values: bool = False
    axes: tuple[int, ...] | None = None

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[1]

    def of_pairs(self, shift: torch.Tensor) -> torch.Tensor:
        """``[n, rotary_dim / 2]``, or ``[n, 1]`` if they are the same: by how many positions each
        pair moves where tokens move by `shift`, ``[n]`` or ``[n, 3]``."""
        if shift.ndim == 1:
            return shift[:, None]
        return shift[:, :1] if self.axes is None else shift[:, list(self.axes)]


def rerotate(
    k: torch.Tensor, shift: torch.Tensor, spec: RotarySpec, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys moved by `shift` positions.

    Args:
        k: ``[..., num_tokens, head_dim]`` rotated keys, any floating dtype;
            ``[num_layers, num_kv_heads, num_tokens, head_dim]`` where `spec` tells layers apart.
        shift: ``[num_tokens]`` integer positions to move by, negative allowed, or ``[num_tokens,
            3]``: on each axis; or one row of these: all by as many.
        spec: the model's rotation.
        out: of k's shape, written; it shares no memory with k. None: a new tensor of k's dtype.

    Returns:
        `out`; the arithmetic is done in float32.
    """
    shift = spec.of_pairs(shift.to(spec.inv_freq.device, torch.float64))
    angle = shift * spec.inv_freq.double()[:, None]
    angle = angle[0] if spec.layers is None else angle[list(spec.layers), None]
    cos, sin = angle.cos().float(), angle.sin().float()
    dim = spec.rotary_dim
    out = torch.empty_like(k) if out is None else out
    x = k[..., :dim].float()
    direct = out.dtype == torch.float32
    moved = out[..., :dim] if direct else torch.empty_like(x)
    (a, b), (moved_a, moved_b) = (_halves(y, spec.interleaved) for y in (x, moved))
    torch.mul(a, cos, out=moved_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=moved_b).addcmul_(a, sin)
    if not direct:
        if out.itemsize == 1:  # float8, beyond whose largest number there is none
            most = torch.finfo(out.dtype).max
            moved.clamp_(-most, most)
        out[..., :dim] = moved
    if dim < k.shape[-1]:
        out[..., dim:] = k[..., dim:]
    return out


def _halves(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Firsts and seconds of the pairs, views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
