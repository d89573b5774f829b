"""What the KV edit kernel is told: which token goes where, and how far its key turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class KVEdit:
    """Tokens to move from one K/V tensor into another.

    A *slot* here is vLLM's ``slot_mapping``: ``page * page_size + offset in the page``. The order
    of the tokens is free; no target slot may appear twice or be a source slot of the same tensor.

    Attributes:
        source_slots: ``[num_tokens]`` int64 slots to read.
        target_slots: ``[num_tokens]`` int64 slots to write.
        run: ``[num_tokens]`` int32 row of the rotation table.
        cos, sin: ``[num_rotations, num_runs, rotary_dim / 2]`` float32, see `rotation_table`.
        interleaved: pairs are neighbours ``(2i, 2i + 1)`` and not halves
            ``(i, i + rotary_dim / 2)``.
        rotation: ``[num_layers]`` int32 row of cos and sin that a layer's keys turn by; None: the
            first, in every layer.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """

    source_slots: torch.Tensor
    target_slots: torch.Tensor
    run: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False
    rotation: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.source_slots)
        if self.target_slots.shape != (n,) or self.run.shape != (n,):
            raise ValueError("source_slots, target_slots and run need one entry per token")
        if self.source_slots.dtype != torch.int64 or self.target_slots.dtype != torch.int64:
            raise ValueError("slots are int64")
        if self.run.dtype != torch.int32:
            raise ValueError("run is int32")
        if self.cos.ndim != 3 or self.cos.shape != self.sin.shape:
            raise ValueError("cos and sin are [num_rotations, num_runs, rotary_dim / 2]")
        if self.rotation is not None and self.rotation.dtype != torch.int32:
            raise ValueError("rotation is int32")
        if self.cos.dtype != torch.float32 or self.sin.dtype != torch.float32:
            raise ValueError("cos and sin are float32: keys are turned in float32")

    @property
    def num_tokens(self) -> int:
        return len(self.source_slots)

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cos.shape[2]


def rotation_table(
    shift: torch.Tensor, inv_freq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of what every run's keys turn by.

    A table per run, and not an angle per key inside the kernel, for two reasons: the angle of a
    long shift needs more than float32 holds, and the kernel then knows nothing of RoPE's kinds. A
    factor that the model multiplied into its keys (YaRN's attention factor) stays as it is under
    a rotation.

    Args:
        shift: ``[num_runs]`` integers, target position minus source position; or ``[num_runs,
            rotary_dim / 2]``: of each pair, whose axis of a position may be another one (M-RoPE).
        inv_freq: ``[num_rotations, rotary_dim / 2]`` angles per position, after scaling (linear,
            llama3, YaRN); 0 where nothing turns.

    Returns:
        cos and sin, ``[num_rotations, num_runs, rotary_dim / 2]`` float32, on the device of
        `inv_freq`.
    """
    shift = shift.to(inv_freq.device, torch.float64).reshape(len(shift), -1)
    angle = shift * inv_freq.double()[:, None]
    return angle.cos().float(), angle.sin().float()
