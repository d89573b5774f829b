"""Re-rotation of keys: move a cached key from one position to another.

RoPE rotates pair ``i`` of a key at position ``p`` by ``p * inv_freq[i]``. Rotations add up, so a
key moves from ``p`` to ``p + d`` by rotating it ``d * inv_freq[i]`` further, whatever factor the
model multiplied in (YaRN's attention factor stays as it is). This holds for every RoPE type whose
``inv_freq`` does not depend on the sequence length: default, linear, llama3, YaRN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUPPORTED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """How a model rotates its keys.

    Attributes:
        inv_freq: ``[num_rotations, rotary_dim / 2]`` float32 angles per position. Channels beyond
            ``rotary_dim`` are not rotated. A layer that rotates nothing has a row of zeros.
        interleaved: pairs are neighbours ``(2i, 2i + 1)`` (GPT-J) and not halves
            ``(i, i + rotary_dim / 2)`` (Llama).
        layers: which row of `inv_freq` each layer turns by; None: the first, in every layer.
        of_values: what is rotated lies where other models keep their values: multi-head latent
            attention keeps the latent first and the keys' rotated part second.
    """

    inv_freq: torch.Tensor
    interleaved: bool = False
    layers: tuple[int, ...] | None = None
    of_values: bool = False

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[1]


def rerotate(k: torch.Tensor, shift: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
    """Keys moved by `shift` positions.

    Args:
        k: ``[..., num_tokens, head_dim]`` rotated keys, any floating dtype;
            ``[num_layers, num_kv_heads, num_tokens, head_dim]`` where `spec` tells layers apart.
        shift: ``[num_tokens]`` integer positions to move by, negative allowed.
        spec: the model's rotation.

    Returns:
        A new tensor of k's shape and dtype; the arithmetic is done in float32.
    """
    angle = shift.to(spec.inv_freq.device, torch.float64)[:, None] * spec.inv_freq.double()[:, None]
    angle = angle[0] if spec.layers is None else angle[list(spec.layers), None]
    cos, sin = angle.cos().float(), angle.sin().float()
    dim = spec.rotary_dim
    x = k[..., :dim].float()
    if spec.interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
    moved_a, moved_b = a * cos - b * sin, b * cos + a * sin
    if spec.interleaved:
        moved = torch.stack((moved_a, moved_b), dim=-1).flatten(-2)
    else:
        moved = torch.cat((moved_a, moved_b), dim=-1)
    if dim == k.shape[-1]:
        return moved.to(k.dtype)
    return torch.cat((moved.to(k.dtype), k[..., dim:]), dim=-1)
