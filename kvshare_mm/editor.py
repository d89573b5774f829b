"""The KV editor: puts a plan's kept runs into a slot, keys re-rotated to their new positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvshare_mm.delta_tree import Piece
from kvshare_mm.rotary import RotarySpec, rerotate
from kvshare_mm.store.base import StoredNode


class KVEditor:
    """Edits donor KV into a slot.

    Args:
        spec: the model's rotation; None only if no piece is ever shifted.
    """

    def __init__(self, spec: RotarySpec | None) -> None:
        self._spec = spec

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
        written = 0
        for piece in pieces:
            stored = owners[piece.owner]
            row = stored.node.owned_row(piece.owner_start, piece.length)
            if row is None:
                raise ValueError(f"{piece.owner} does not own {piece}")
            k = stored.kv.k[:, :, row : row + piece.length].to(keys.device, keys.dtype)
            v = stored.kv.v[:, :, row : row + piece.length].to(values.device, values.dtype)
            if piece.shift:
                if self._spec is None:
                    raise ValueError("a shifted piece needs the model's rotation")
                k = rerotate(k, torch.full((piece.length,), piece.shift), self._spec)
            keys[:, :, piece.start : piece.end] = k
            values[:, :, piece.start : piece.end] = v
            written += k.nbytes + v.nbytes
        return written
