"""The KV editor: puts a plan's kept runs into a slot, keys re-rotated to their new positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvshare_mm.delta_tree import Piece
from kvshare_mm.kernels.dispatch import edit_kv
from kvshare_mm.kernels.edits import KVEdit, rotation_table
from kvshare_mm.rotary import RotarySpec, rerotate
from kvshare_mm.store.base import StoredNode


class KVEditor:
    """Edits donor KV into a slot.

    Args:
        spec: the model's rotation; None only if no piece is ever shifted.
        backend: "triton" moves all pieces of a donor in one kernel; "torch" moves one after the
            other, which is as fast where there is no launch to save.
    """

    def __init__(self, spec: RotarySpec | None, backend: str = "torch") -> None:
        self._spec = spec
        self._backend = backend

    def edit(
        self,
        pieces: Sequence[Piece],
        read: Callable[[str], StoredNode],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> int:
        """Write the KV of `pieces` into a slot.

        All donors are read before the first byte is written, so a donor that cannot be read leaves
        the slot as it was.

        Args:
            pieces: target spans with their owners, in target coordinates.
            read: fetches an owner; its errors (KVUnavailableError) pass through.
            keys: ``[num_layers, num_kv_heads, max_len, head_dim]``, the slot's keys, written.
            values: the slot's values, written.

        Returns:
            Bytes written.
        """
        owners = {owner: read(owner) for owner in dict.fromkeys(p.owner for p in pieces)}
        if self._spec is None and any(p.shift for p in pieces):
            raise ValueError("a shifted piece needs the model's rotation")
        placed: dict[str, list[tuple[Piece, int]]] = {owner: [] for owner in owners}
        for piece in pieces:
            row = owners[piece.owner].node.owned_row(piece.owner_start, piece.length)
            if row is None:
                raise ValueError(f"{piece.owner} does not own {piece}")
            placed[piece.owner].append((piece, row))
        move = self._move if self._backend == "torch" else self._move_at_once
        for owner, stored in owners.items():
            move(stored, placed[owner], keys, values)
        positions = sum(p.length for p in pieces)
        return positions * (_position_bytes(keys) + _position_bytes(values))

    def _move(
        self,
        stored: StoredNode,
        placed: Sequence[tuple[Piece, int]],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write one donor's pieces, each with the row of the donor's KV that it starts at."""
        for piece, row in placed:
            k = stored.kv.k[:, :, row : row + piece.length].to(keys.device, keys.dtype)
            v = stored.kv.v[:, :, row : row + piece.length].to(values.device, values.dtype)
            if piece.shift:
                assert self._spec is not None
                k = rerotate(k, torch.full((piece.length,), piece.shift), self._spec)
            keys[:, :, piece.start : piece.end] = k
            values[:, :, piece.start : piece.end] = v

    def _move_at_once(
        self,
        stored: StoredNode,
        placed: Sequence[tuple[Piece, int]],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """`_move` with one copy to the device and one launch."""
        device = keys.device
        first = min(row for _, row in placed)
        last = max(row + piece.length for piece, row in placed)
        shift = torch.tensor([piece.shift for piece, _ in placed])
        inv_freq = torch.empty(0) if self._spec is None else self._spec.inv_freq.cpu()
        cos, sin = rotation_table(shift, inv_freq)
        lengths = torch.tensor([piece.length for piece, _ in placed])
        edit = KVEdit(
            torch.cat([torch.arange(r - first, r - first + p.length) for p, r in placed]).to(
                device
            ),
            torch.cat([torch.arange(p.start, p.end) for p, _ in placed]).to(device),
            torch.arange(len(placed), dtype=torch.int32).repeat_interleave(lengths).to(device),
            cos.to(device),
            sin.to(device),
            self._spec is not None and self._spec.interleaved,
        )
        k, v = (x[:, :, first:last].to(device)[:, None] for x in (stored.kv.k, stored.kv.v))
        edit_kv(k, v, keys[:, None], values[:, None], edit, self._backend)


def _position_bytes(kv: torch.Tensor) -> int:
    layers, heads, _, dim = kv.shape
    return layers * heads * dim * kv.itemsize
