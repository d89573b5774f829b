"""The KV edit against the reference, and against keys that a rotary embedding made."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.kernels.dispatch import edit_kv
from kvshare_mm.kernels.edits import KVEdit, rotation_table
from kvshare_mm.kernels.reference import edit_kv_reference
from kvshare_mm.reuse.rotary import RotarySpec, rerotate

from .conftest import DEVICE

LAYERS, HEADS = 2, 2
BACKENDS = ["triton", "torch"]
ATOL = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator) * 2 - 1).to(dtype).to(DEVICE)


def _edit(
    runs: list[tuple[int, int, int]],
    source_table: list[int],
    target_table: list[int],
    sizes: tuple[int, int],
    inv_freq: torch.Tensor,
    interleaved: bool = False,
    rotation: list[int] | None = None,
) -> KVEdit:
    """An edit of runs ``(source start, target start, length)``."""
    source, target, run = [], [], []
    for i, (start, to, length) in enumerate(runs):
        source.append(torch.arange(start, start + length))
        target.append(torch.arange(to, to + length))
        run.append(torch.full((length,), i, dtype=torch.int32))
    shift = torch.tensor([to - start for start, to, _ in runs])
    cos, sin = rotation_table(shift, inv_freq if inv_freq.ndim == 2 else inv_freq[None])
    return KVEdit(
        _slots(torch.cat(source), torch.tensor(source_table), sizes[0]).to(DEVICE),
        _slots(torch.cat(target), torch.tensor(target_table), sizes[1]).to(DEVICE),
        torch.cat(run).to(DEVICE),
        cos.to(DEVICE),
        sin.to(DEVICE),
        interleaved,
        None if rotation is None else torch.tensor(rotation, dtype=torch.int32, device=DEVICE),
    )


def _slots(positions: torch.Tensor, block_table: torch.Tensor, page_size: int) -> torch.Tensor:
    return block_table[positions // page_size] * page_size + positions % page_size


def _check(
    edit: KVEdit,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    backend: str,
) -> None:
    (from_pages, from_size), (to_pages, to_size) = shapes
    source = [
        _random(LAYERS, from_pages, HEADS, from_size, d, dtype=dtypes[0], seed=d) for d in dims
    ]
    target = [
        _random(LAYERS, to_pages, HEADS, to_size, d, dtype=dtypes[1], seed=d + 1) for d in dims
    ]
    # Whatever is not named by the edit must not be read, or it would spread.
    unread = torch.ones(from_pages * from_size, dtype=torch.bool)
    unread[edit.source_slots.cpu()] = False
    for x in source:
        for slot in unread.nonzero()[:, 0].tolist():
            x[:, slot // from_size, :, slot % from_size] = float("nan")
    expected = [x.cpu().clone() for x in target]
    values = (getattr(edit, each.name) for each in fields(edit))
    on_cpu = KVEdit(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in values))
    edit_kv_reference(*[x.cpu() for x in source], *expected, on_cpu)
    edit_kv(*source, *target, edit, backend)
    for got, want in zip(target, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=ATOL[dtypes[1]], rtol=0)
    written = torch.zeros(to_pages * to_size, dtype=torch.bool)
    written[edit.target_slots.cpu()] = True
    for got, d in zip(target, dims, strict=True):
        before = _random(LAYERS, to_pages, HEADS, to_size, d, dtype=dtypes[1], seed=d + 1)
        for slot in (~written).nonzero()[:, 0].tolist():
            at = slot // to_size, slot % to_size
            assert torch.equal(got[:, at[0], :, at[1]], before[:, at[0], :, at[1]])


RUNS = [(0, 0, 5), (9, 6, 11), (22, 40, 3), (30, 18, 17)]


def _freqs(pairs: int) -> torch.Tensor:
    return 1.0 / (1 + torch.arange(pairs).float())


# Head dims of keys and values, frequencies, and what else is not as usual.
EDITS: list[dict[str, Any]] = [
    *({"dtypes": (d, d)} for d in ATOL),
    {"dtypes": (torch.float32, torch.bfloat16)},
    {"dtypes": (torch.float16, torch.float32)},
    *(
        {"dims": dims, "inv_freq": _freqs(pairs)}
        for *dims, pairs in [(32, 32, 8), (80, 64, 16), (24, 40, 12), (16, 16, 0)]
    ),
    *({"sizes": sizes} for sizes in [(16, 16), (50, 16), (16, 50), (32, 128)]),
    *(
        {"inv_freq": torch.stack((torch.ones(8), _freqs(8), torch.zeros(8))), "rotation": rotation}
        for rotation in ([1, 0], [2, 1], [2, 2])
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("given", EDITS, ids=" ".join)
def test_every_layout(backend: str, interleaved: bool, given: dict[str, Any]) -> None:
    sizes = given.get("sizes", (50, 50))
    tables = [[5, 0, 3, 2][: -(-50 // size)] for size in sizes]
    inv_freq = given.get("inv_freq", 10000.0 ** -(torch.arange(16) / 16))
    edit = _edit(RUNS, *tables, sizes, inv_freq, interleaved, given.get("rotation"))
    shapes = ((6, sizes[0]), (6, sizes[1]))
    dtypes = given.get("dtypes", (torch.float32, torch.float32))
    _check(edit, shapes, given.get("dims", (32, 32)), dtypes, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unshifted_run_is_copied_bit_by_bit(backend: str) -> None:
    source = _random(1, 1, 2, 40, 32, dtype=torch.bfloat16, seed=0)
    target = torch.zeros_like(source)
    edit = _edit([(3, 3, 20)], [0], [0], (40, 40), 10000.0 ** -(torch.arange(16) / 16))
    edit_kv(source, source, target, target.clone(), edit, backend)
    assert torch.equal(target[:, :, :, 3:23], source[:, :, :, 3:23])
    assert not target[:, :, :, 23:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_move(backend: str) -> None:
    kv = torch.zeros(1, 1, 2, 4, 16, device=DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    table = torch.ones(1, 0, 8, device=DEVICE)
    edit_kv(kv, kv, kv, kv, KVEdit(nothing, nothing, nothing.int(), table, table), backend)


@st.composite
def _moves(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], int, int]:
    runs, at = [], 0
    for _ in range(draw(st.integers(1, 5))):
        at += draw(st.integers(0, 6))
        length = draw(st.integers(1, 18))
        runs.append((draw(st.integers(0, 100 - length)), at, length))
        at += length
    return runs, draw(st.sampled_from([16, 24, 64])), draw(st.sampled_from([16, 33, 128]))


@settings(max_examples=15)
@given(moves=_moves(), interleaved=st.booleans(), data=st.data())
def test_any_runs(
    moves: tuple[list[tuple[int, int, int]], int, int], interleaved: bool, data: st.DataObject
) -> None:
    runs, *sizes = moves
    tables = []
    for size, length in zip(sizes, (100, max(to + n for _, to, n in runs)), strict=True):
        tables.append(data.draw(st.permutations(range(-(-length // size) + 1)))[:-1])
    edit = _edit(
        runs, *tables, (sizes[0], sizes[1]), torch.tensor([1.0, 0.31, 0.1, 0.013]), interleaved
    )
    shapes = ((len(tables[0]) + 1, sizes[0]), (len(tables[1]) + 1, sizes[1]))
    for backend in BACKENDS:
        _check(edit, shapes, (12, 16), (torch.float32, torch.float32), backend)


# -- what a model's rotary embedding makes ------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-300, 100_000])
def test_same_as_rerotate(backend: str, shift: int) -> None:
    inv_freq = 10000.0 ** -(torch.arange(16) / 16)
    k = _random(1, 1, 2, 20, 32, dtype=torch.float32, seed=3)
    moved = torch.zeros_like(k)
    cos, sin = rotation_table(torch.tensor([shift]), inv_freq[None])
    slots = torch.arange(20, device=DEVICE)
    edit = KVEdit(slots, slots, torch.zeros_like(slots).int(), cos.to(DEVICE), sin.to(DEVICE))
    edit_kv(k, k, moved, torch.zeros_like(k), edit, backend)
    want = rerotate(k.cpu(), torch.full((20,), shift), RotarySpec(inv_freq[None]))
    torch.testing.assert_close(moved.cpu(), want, atol=1e-6, rtol=0)


# -- what is refused ----------------------------------------------------------------------------


def test_an_edit_that_does_not_fit_is_refused() -> None:
    slots, table = torch.arange(3), torch.ones(1, 1, 4)
    good: dict[str, Any] = {
        "source_slots": slots,
        "target_slots": slots,
        "run": torch.zeros(3, dtype=torch.int32),
        "cos": table,
        "sin": table,
    }
    KVEdit(**good)
    for match, name, value in (
        ("one entry per token", "target_slots", torch.arange(2)),
        ("int64", "source_slots", slots.int()),
        ("run is int32", "run", slots),
        ("num_runs", "sin", torch.ones(1, 2, 4)),
        ("float32", "cos", table.double()),
        ("rotation is int32", "rotation", torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match=match):
            KVEdit(**{**good, name: value})


def test_tensors_that_do_not_fit_are_refused() -> None:
    kv = torch.zeros(1, 2, 2, 4, 16)
    slots, table = torch.arange(3), torch.ones(1, 1, 4)
    edit = KVEdit(slots, slots, torch.zeros(3, dtype=torch.int32), table, table)
    for match, tensors in (
        ("are \\[layers", (kv[0], kv, kv, kv)),
        ("differ in layers", (kv, kv, torch.zeros(2, 2, 2, 4, 16), kv)),
        ("dense", (kv, kv.transpose(3, 4).contiguous().transpose(3, 4), kv, kv)),
        ("keys and values", (kv, torch.zeros(1, 3, 2, 4, 16), kv, kv)),
    ):
        with pytest.raises(ValueError, match=match):
            edit_kv(*tensors, edit)
    layers = KVEdit(slots, slots, edit.run, table, table, rotation=torch.zeros(3).int())
    with pytest.raises(ValueError, match="3 layers' rotations"):
        edit_kv(kv, kv, kv, kv, layers)
    wide = KVEdit(slots, slots, edit.run, torch.ones(1, 1, 9), torch.ones(1, 1, 9))
    with pytest.raises(ValueError, match="18 rotary dims"):
        edit_kv(kv, kv, kv, kv, wide)
