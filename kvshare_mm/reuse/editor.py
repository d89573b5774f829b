"""The KV editor: puts a plan's kept runs into a slot, keys re-rotated to their new positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvshare_mm.kernels.backend import resolve
from kvshare_mm.kernels.dispatch import edit_kv
from kvshare_mm.kernels.edits import KVEdit, rotation_table
from kvshare_mm.kernels.q8 import unpack
from kvshare_mm.node import Node, Piece
from kvshare_mm.reuse.plan import Turn, turn_of
from kvshare_mm.reuse.rotary import RotarySpec, rerotate
from kvshare_mm.store.base import StoredNode

# Bytes of keys that are moved at a time on a CPU: what its cache holds is not fetched twice.
_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece, the rows of its owner's KV and of the slot that it starts at, and what its keys are
    turned by."""

    piece: Piece
    row: int
    target: int
    shift: Turn


# K or V of a donor, and what it was packed with.
_Donor = tuple[torch.Tensor, torch.Tensor | None]

# Donors, and where their pieces go.
Placement = Sequence[tuple[StoredNode, Sequence[_Placed]]]


class KVEditor:
    """Edits donor KV into a slot.

    Args:
        spec: the model's rotation; None only if no piece is ever shifted.
        backend: "triton" moves all pieces of a donor in one kernel; "torch" moves one after the
            other, which is as fast where there is no launch to save; "auto" is what fits the
            device that the slot is on.

    Attributes:
        each_axis: see `PlannerOptions`.
    """

    def __init__(self, spec: RotarySpec | None, backend: str = "auto") -> None:
        self._spec = spec
        self._backend = backend
        self.each_axis = spec is not None and spec.axes is not None

    def edit(
        self,
        pieces: Sequence[Piece],
        read: Callable[[str], StoredNode],
        k: torch.Tensor,
        v: torch.Tensor,
        positions: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> int:
        """Write the KV of `pieces` into a slot.

        All donors are read before the first byte is written, so a donor that cannot be read leaves
        the slot as it was.

        Args:
            pieces: target spans with their owners, in target coordinates.
            read: fetches an owner; its errors (KVUnavailableError) pass through.
            k: ``[num_layers, num_kv_heads, max_len, head_dim]``, the slot's keys, written.
            v: the slot's values, written.
            positions: ``[3, N]`` rotary positions of the target; None: the index.
            rows: ``[N]`` where in the slot a position is, one behind the other within a piece;
                None: at its index.

        Returns:
            Bytes written.

        Raises:
            ValueError: a piece that its owner does not own, or whose positions do not move as one.
        """
        self.write(self.place(pieces, read, positions, rows), k, v)
        moved = sum(p.length for p in pieces)
        return moved * (_position_bytes(k) + _position_bytes(v))

    def place(
        self,
        pieces: Sequence[Piece],
        read: Callable[[str], StoredNode],
        positions: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> Placement:
        """Read the donors of `pieces`: all of `edit` that can fail. Args and errors: see there."""
        owners = {owner: read(owner) for owner in dict.fromkeys(p.owner for p in pieces)}
        placed: dict[str, list[_Placed]] = {owner: [] for owner in owners}
        for piece in pieces:
            target = piece.start if rows is None else int(rows[piece.start])
            node = owners[piece.owner].node
            placed[piece.owner].append(_place(piece, node, positions, target))
        shifts = {p.shift for part in placed.values() for p in part}
        if self._spec is None and any(map(any, shifts)):
            raise ValueError("a shifted piece needs the model's rotation")
        if not self.each_axis and any(len(set(shift)) > 1 for shift in shifts):
            raise ValueError("the axes of a piece do not move as one")
        return [(stored, placed[owner]) for owner, stored in owners.items()]

    def write(self, placement: Placement, k: torch.Tensor, v: torch.Tensor, first: int = 0) -> None:
        """Write what was placed.

        Args:
            k, v: see `edit`; they may hold some of the donors' layers alone.
            first: the first of these.
        """
        layers = slice(first, first + len(k))
        spec = self._spec
        if spec is not None and spec.layers is not None:
            spec = replace(spec, layers=spec.layers[layers])
        # Not every GPU that keeps float8 can compute with it.
        at_once = k.itemsize > 1 and resolve(self._backend, k.device) != "torch"
        move = _move_at_once if at_once else _move
        for stored, placed in placement:
            exponents = stored.kv.k_exponents
            donor_k = stored.kv.k[layers], None if exponents is None else exponents[layers]
            move(spec, donor_k, (stored.kv.v[layers], None), placed, k, v)


def _move(
    spec: RotarySpec | None,
    donor_k: _Donor,
    donor_v: _Donor,
    placed: Sequence[_Placed],
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Write one donor's pieces, `_BLOCK_BYTES` after `_BLOCK_BYTES`."""
    if not len(k):  # a model without attention
        return
    turned, still = ((donor_k, k), (donor_v, v))
    if spec is not None and spec.of_values:
        turned, still = still, turned
    for part in placed:
        source = slice(part.row, part.row + part.piece.length)
        target = slice(part.target, part.target + part.piece.length)
        step = max(1, len(k) * _BLOCK_BYTES // (_position_bytes(k) * part.piece.length))
        for first in range(0, len(k), step):
            layers = slice(first, first + step)
            for (donor, slot), shift in ((turned, part.shift), (still, (0, 0, 0))):
                after = slot[layers, :, target]
                kept, exponents = donor
                exponents = None if exponents is None else exponents[layers]
                before = _unpacked((kept[layers, :, source], exponents), after)
                if any(shift):
                    assert spec is not None
                    own = spec if spec.layers is None else replace(spec, layers=spec.layers[layers])
                    before = before.to(after.device, after.dtype)
                    rerotate(before, torch.tensor([shift]), own, out=after)
                else:
                    after.copy_(before)


def _move_at_once(
    spec: RotarySpec | None,
    donor_k: _Donor,
    donor_v: _Donor,
    placed: Sequence[_Placed],
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """`_move` with one copy to the device and one launch."""
    device = k.device
    pieces = [p.piece for p in placed]
    first = min(p.row for p in placed)
    rows = [p.row - first for p in placed]
    last = max(p.row + p.piece.length for p in placed)
    spec = spec or RotarySpec(torch.empty(1, 0))
    shift = spec.of_pairs(torch.tensor([p.shift for p in placed]))
    cos, sin = rotation_table(shift, spec.inv_freq.cpu())
    lengths = torch.tensor([piece.length for piece in pieces])
    edit = KVEdit(
        torch.cat([torch.arange(r, r + p.length) for p, r in zip(pieces, rows, strict=True)]).to(
            device
        ),
        torch.cat([torch.arange(p.target, p.target + p.piece.length) for p in placed]).to(device),
        torch.arange(len(placed), dtype=torch.int32).repeat_interleave(lengths).to(device),
        cos.to(device),
        sin.to(device),
        spec.interleaved,
        None if spec.layers is None else torch.tensor(spec.layers).int().to(device),
    )
    source_k, source_v = (
        _unpacked((x[:, :, first:last].to(device), exponents), slot)[:, None]
        for (x, exponents), slot in ((donor_k, k), (donor_v, v))
    )
    if spec.of_values:
        edit_kv(source_v, source_k, v[:, None], k[:, None], edit, "triton")
    else:
        edit_kv(source_k, source_v, k[:, None], v[:, None], edit, "triton")


def _unpacked(donor: _Donor, slot: torch.Tensor) -> torch.Tensor:
    kept, exponents = donor
    if kept.dtype != torch.int8:
        return kept
    if exponents is not None:
        exponents = exponents.to(kept.device)
    return unpack(kept, slot.shape[-1], slot.dtype, exponents)


def _place(piece: Piece, owner: Node, positions: np.ndarray | None, target: int) -> _Placed:
    row = owner.owned_row(piece.owner_start, piece.length)
    if row is None:
        raise ValueError(f"{piece.owner} does not own {piece}")
    shift = turn_of(positions, piece.start, owner.positions, piece.owner_start, piece.length)
    if shift is None:
        raise ValueError(f"the positions of {piece} do not move as one")
    return _Placed(piece, row, target, shift)


def _position_bytes(kv: torch.Tensor) -> int:
    layers, heads, _, dim = kv.shape
    return layers * heads * dim * kv.itemsize
