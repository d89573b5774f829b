"""The KV editor against a reference that moves one position of one head at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.kernels.q8 import unpack
from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.rotary import RotarySpec
from kvshare_mm.store.base import NodeKV, StoredNode

LAYERS, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 10, 6
INV_FREQ = torch.tensor([1.0, 0.31, 0.1, 0.013])  # 8 of 10 channels turn
SLOT_LEN = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _stored(node_id: str, own: tuple[tuple[int, int], ...], dtype: torch.dtype) -> StoredNode:
    generator = torch.Generator().manual_seed(sum(node_id.encode()))
    spans = tuple(Span(*s) for s in own)
    node = Node(node_id, "ns", np.arange(64, dtype=np.uint64), spans)
    kv = NodeKV(
        *(
            torch.randn(LAYERS, HEADS, node.num_owned, dim, generator=generator).to(dtype)
            for dim in (KEY_DIM, VALUE_DIM)
        )
    )
    return StoredNode(node, kv)


def _slot(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of one of three slots, as the engine hands it in."""
    generator = torch.Generator().manual_seed(1)
    k, v = (
        torch.randn(LAYERS, 3, HEADS, SLOT_LEN, dim, generator=generator).to(dtype)
        for dim in (KEY_DIM, VALUE_DIM)
    )
    return k[:, 1], v[:, 1]


def _row(stored: StoredNode, position: int) -> int:
    """Where the node keeps `position`, counted by hand."""
    owned = [p for span in stored.node.own for p in range(span.start, span.end)]
    return owned.index(position)


def _turned(key: torch.Tensor, shift: int | list[int], interleaved: bool) -> torch.Tensor:
    """One head's key, pair by pair, in double precision."""
    out = key.double().clone()
    half = len(INV_FREQ)
    for i, freq in enumerate(INV_FREQ.double().tolist()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turn = freq * (shift if isinstance(shift, int) else shift[i])
        cos, sin = np.cos(turn), np.sin(turn)
        out[a] = float(key[a]) * cos - float(key[b]) * sin
        out[b] = float(key[b]) * cos + float(key[a]) * sin
    return out


def _assert_moved(
    k: torch.Tensor,
    v: torch.Tensor,
    piece: Piece,
    stored: StoredNode,
    turn: int | list[int],
    interleaved: bool = False,
) -> None:
    """A slot holds a piece: its keys turned, its values as they were."""
    # One rounding to the slot's dtype, and float32 arithmetic before it.
    ulp = 2.0**-8 if k.dtype == torch.bfloat16 else 0.0
    for i in range(piece.length):
        at, row = piece.start + i, _row(stored, piece.owner_start + i)
        source = stored.kv.k[:, :, row].to(k.dtype)
        assert torch.equal(v[:, :, at], stored.kv.v[:, :, row].to(v.dtype))
        assert turn or torch.equal(k[:, :, at], source)
        for layer in range(LAYERS):
            for head in range(HEADS):
                want = _turned(source[layer, head], turn, interleaved)
                got = k[layer, head, at].double()
                assert torch.all((got - want).abs() <= ulp * want.abs() + 1e-5)


def _reading(nodes: dict[str, StoredNode]) -> Callable[[str], StoredNode]:
    def read(node_id: str) -> StoredNode:
        if node_id not in nodes:
            raise KVUnavailableError("evicted", node_id)
        return nodes[node_id]

    return read


@st.composite
def _edits(draw: st.DrawFn) -> tuple[dict[str, tuple[tuple[int, int], ...]], list[Piece]]:
    """Owners with gaps in what they own, and target pieces that each lie in one owned span."""
    owners = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        edges = sorted(draw(st.sets(st.integers(0, 64), min_size=2, max_size=6)))
        owners[name] = tuple(zip(edges[::2], edges[1::2], strict=False))
    pieces = []
    at = draw(st.integers(0, 3))
    while at < SLOT_LEN:
        owner = draw(st.sampled_from(sorted(owners)))
        start, end = draw(st.sampled_from(owners[owner]))
        first = draw(st.integers(start, end - 1))
        length = draw(st.integers(1, min(end - first, SLOT_LEN - at)))
        pieces.append(Piece(owner, first, at, length))
        at += length + draw(st.integers(0, 5))
    return owners, draw(st.permutations(pieces))


@settings(max_examples=25)
@given(
    edits=_edits(),
    store_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    slot_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    interleaved=st.booleans(),
)
def test_same_as_position_by_position(
    edits: tuple[dict[str, tuple[tuple[int, int], ...]], list[Piece]],
    store_dtype: torch.dtype,
    slot_dtype: torch.dtype,
    interleaved: bool,
) -> None:
    owners, pieces = edits
    nodes = {name: _stored(name, own, store_dtype) for name, own in owners.items()}
    keys, values = _slot(slot_dtype)
    others = [tensor._base[:, [0, 2]].clone() for tensor in (keys, values)]
    untouched = torch.ones(SLOT_LEN, dtype=torch.bool)
    before_k, before_v = keys.clone(), values.clone()
    stored_before = {name: (n.kv.k.clone(), n.kv.v.clone()) for name, n in nodes.items()}

    written = KVEditor(RotarySpec(INV_FREQ[None], interleaved)).edit(
        pieces, _reading(nodes), keys, values
    )

    for piece in pieces:
        untouched[piece.start : piece.end] = False
        _assert_moved(keys, values, piece, nodes[piece.owner], piece.shift, interleaved)
    assert torch.equal(keys[:, :, untouched], before_k[:, :, untouched])
    assert torch.equal(values[:, :, untouched], before_v[:, :, untouched])
    for tensor, before in zip((keys, values), others, strict=True):
        assert torch.equal(tensor._base[:, [0, 2]], before)
    per_position = LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * slot_dtype.itemsize
    assert written == int((~untouched).sum()) * per_position
    for name, (k, v) in stored_before.items():
        assert torch.equal(nodes[name].kv.k, k) and torch.equal(nodes[name].kv.v, v)


def test_a_read_error_leaves_the_slot_as_it_was() -> None:
    nodes = {"a": _stored("a", ((0, 20),), torch.float32)}
    slot = _slot(torch.float32)
    before = [tensor.clone() for tensor in slot]
    pieces = [Piece("a", 0, 2, 8), Piece("lost", 3, 10, 5), Piece("a", 10, 20, 4)]
    with pytest.raises(KVUnavailableError, match="lost"):
        KVEditor(RotarySpec(INV_FREQ[None])).edit(pieces, _reading(nodes), *slot)
    assert all(torch.equal(*pair) for pair in zip(slot, before, strict=True))


def test_what_an_owner_does_not_own_is_refused() -> None:
    nodes = {"a": _stored("a", ((0, 10), (14, 20)), torch.float32)}
    for first, length in ((8, 4), (10, 2), (9, 6), (19, 2)):
        with pytest.raises(ValueError, match="does not own"):
            KVEditor(RotarySpec(INV_FREQ[None])).edit(
                [Piece("a", first, 0, length)], _reading(nodes), *_slot(torch.float32)
            )


def test_without_a_rotation_only_unshifted_pieces_are_taken() -> None:
    nodes = {"a": _stored("a", ((0, 20),), torch.float32)}
    keys, values = _slot(torch.float32)
    editor = KVEditor(None)
    editor.edit([Piece("a", 5, 5, 10)], _reading(nodes), keys, values)
    assert torch.equal(keys[:, :, 5:15], nodes["a"].kv.k[:, :, 5:15])
    with pytest.raises(ValueError, match="rotation"):
        editor.edit([Piece("a", 5, 6, 10)], _reading(nodes), keys, values)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pieces_turn_by_their_positions_and_not_by_their_index(backend: str) -> None:
    stored = _stored("a", ((0, 12),), torch.float32)
    owner = np.tile(np.arange(64), (3, 1))
    owner[:, 6:] -= 4  # behind a picture of six tokens and a longer side of two
    stored = StoredNode(replace(stored.node, positions=owner), stored.kv)
    target = np.tile(np.arange(20), (3, 1))
    pieces = [Piece("a", 8, 10, 3), Piece("a", 1, 2, 2)]
    k, v = _slot(torch.float32)
    editor = KVEditor(RotarySpec(INV_FREQ[None]), backend)
    editor.edit(pieces, lambda _: stored, k, v, target)
    for piece, turn in zip(pieces, (6, 1), strict=True):
        _assert_moved(k, v, piece, stored, turn)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_axis_turns_its_own_pairs(backend: str) -> None:
    stored = _stored("a", ((0, 12),), torch.float32)
    stored = StoredNode(replace(stored.node, positions=np.tile(np.arange(64), (3, 1))), stored.kv)
    target = np.tile(np.arange(20), (3, 1))
    target[0, 10:13] += 3
    target[2, 2:4] -= 2
    pieces = [Piece("a", 8, 10, 3), Piece("a", 1, 2, 2), Piece("a", 3, 5, 2)]
    k, v = _slot(torch.float32)
    editor = KVEditor(RotarySpec(INV_FREQ[None], axes=(0, 1, 2, 2)), backend)
    assert editor.each_axis
    editor.edit(pieces, lambda _: stored, k, v, target)
    for piece, turn in zip(pieces, ([5, 2, 2, 2], [1, 1, -1, -1], [2] * 4), strict=True):
        _assert_moved(k, v, piece, stored, turn)
    unknown = KVEditor(RotarySpec(INV_FREQ[None]), backend)
    with pytest.raises(ValueError, match="do not move as one"):
        unknown.edit(pieces, lambda _: stored, k, v, target)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_slot_may_hold_kept_positions_alone(backend: str) -> None:
    nodes = {x: _stored(x, ((0, 30),), torch.float32) for x in "ab"}
    pieces = [Piece("a", 1, 4, 3), Piece("b", 9, 10, 5), Piece("a", 6, 20, 2)]
    kept = np.concatenate([np.arange(p.start, p.end) for p in pieces])
    rows = np.zeros(SLOT_LEN, np.int64)
    rows[kept] = np.arange(len(kept))
    whole, narrow = (
        _slot(torch.float32),
        [x[:, :, : len(kept)].clone() for x in _slot(torch.float32)],
    )
    editor = KVEditor(RotarySpec(INV_FREQ[None]), backend)
    editor.edit(pieces, _reading(nodes), *whole)
    editor.edit(pieces, _reading(nodes), *narrow, rows=rows)
    for x, y in zip(whole, narrow, strict=True):
        assert torch.equal(x[:, :, kept], y)


def test_a_piece_whose_axes_part_is_refused_before_anything_is_written() -> None:
    stored = _stored("a", ((0, 12),), torch.float32)
    target = np.tile(np.arange(20), (3, 1))
    target[1, 5:] += 1
    k, v = _slot(torch.float32)
    before = k.clone(), v.clone()
    with pytest.raises(ValueError, match="do not move as one"):
        KVEditor(RotarySpec(INV_FREQ[None])).edit(
            [Piece("a", 0, 0, 2), Piece("a", 4, 3, 4)], lambda _: stored, k, v, target
        )
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("block", [1, 2 << 20])
def test_a_few_layers_after_the_others(
    backend: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare_mm.reuse.editor._BLOCK_BYTES", block)
    nodes = {x: _stored(x, ((0, 30),), torch.float32) for x in "ab"}
    pieces = [Piece("a", 1, 4, 3), Piece("b", 9, 10, 5), Piece("a", 20, 20, 2)]
    turns = torch.stack([INV_FREQ, torch.zeros_like(INV_FREQ)])
    which = tuple(i % 2 for i in range(LAYERS))
    editor = KVEditor(RotarySpec(turns, layers=which), backend)
    whole, parts = _slot(torch.float32), _slot(torch.float32)
    placement = editor.place(pieces, _reading(nodes))
    editor.write(placement, *whole)
    for first in range(LAYERS):
        editor.write(placement, *(x[first : first + 1] for x in parts), first)
    for x, y in zip(whole, parts, strict=True):
        assert torch.equal(x, y)
    moved = whole[0][1, :, 4:7]  # in a layer that does not turn
    assert torch.equal(moved, nodes["a"].kv.k[1, :, 1:4])
    assert not torch.allclose(whole[0][0, :, 4:7], nodes["a"].kv.k[0, :, 1:4])


@settings(max_examples=25)
@given(edits=_edits(), slot_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_packed_donors_are_edited_as_what_they_hold(
    edits: tuple[dict[str, tuple[tuple[int, int], ...]], list[Piece]], slot_dtype: torch.dtype
) -> None:
    owners, pieces = edits
    whole = {name: _stored(name, own, torch.float32) for name, own in owners.items()}
    packed = {
        name: replace(each, kv=NodeKV.packed(each.kv.k, each.kv.v)) for name, each in whole.items()
    }
    rounded = {
        name: replace(
            each,
            kv=NodeKV(
                unpack(each.kv.k, KEY_DIM, slot_dtype, each.kv.k_exponents),
                unpack(each.kv.v, VALUE_DIM, slot_dtype),
            ),
        )
        for name, each in packed.items()
    }
    for backend in ("torch", "triton"):
        editor = KVEditor(RotarySpec(INV_FREQ[None]), backend)
        found, want = _slot(slot_dtype), _slot(slot_dtype)
        editor.edit(pieces, _reading(packed), *found)
        editor.edit(pieces, _reading(rounded), *want)
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
