"""The attention kernels and the torch path against the reference: every layout, every shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvshare_mm.kernels import dispatch
from kvshare_mm.kernels.partial_attention import partial_attention_triton
from kvshare_mm.kernels.ragged import CHUNK, RaggedQueries
from kvshare_mm.kernels.reference import gather_pages_reference, partial_attention_reference
from kvshare_mm.kernels.scoring import PLAIN, Scoring
from kvshare_mm.kernels.tiles import Tile

from .conftest import DEVICE, Case, make_case

SMALL = Tile(16, 16, 4, 1)
WIDE = Tile(32, 64, 4, 1)
ATOL = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def want(case: Case, scoring: Scoring = PLAIN) -> torch.Tensor:
    """What the reference says, request by request."""
    out = []
    for r, (index, query) in enumerate(zip(case.indices, case.split(case.query), strict=True)):
        key, value = (
            gather_pages_reference(x.cpu(), case.table[r].cpu()) for x in (case.key, case.value)
        )
        sees = case.sees[r] if case.sees else None
        rows = partial_attention_reference(
            query.cpu().transpose(0, 1).float(), key, value, index, case.scale, scoring, sees
        )
        out.append(rows.transpose(0, 1))
    return torch.cat(out)


def check(case: Case, got: torch.Tensor, scoring: Scoring = PLAIN) -> None:
    assert got.dtype == case.query.dtype
    assert not got.isnan().any(), "a key that must not be seen was seen"
    torch.testing.assert_close(
        got.cpu().float(),
        want(case, scoring),
        atol=ATOL[case.query.dtype],
        rtol=0,
        check_dtype=False,
    )


def on_triton(
    case: Case, tile: Tile = SMALL, splits: int = 1, scoring: Scoring = PLAIN
) -> torch.Tensor:
    return partial_attention_triton(
        case.query, case.key, case.value, case.batch, case.scale, tile, splits, scoring
    )


def on(backend: str, case: Case, scoring: Scoring = PLAIN) -> torch.Tensor:
    return dispatch.partial_attention(
        case.query, case.key, case.value, case.batch, case.scale, backend, scoring
    )


def check_both(case: Case, tile: Tile = SMALL, splits: int = 1, scoring: Scoring = PLAIN) -> None:
    check(case, on_triton(case, tile, splits, scoring), scoring)
    check(case, on("torch", case, scoring), scoring)


RAGGED = [[0, 3, 4, 5, 17, 40], [], [11], list(range(21)), [29, 30, 31, 32]]


_EDGES = [15, 16, 31, 32, 47, 48]
LAYOUTS: list[dict[str, Any]] = [
    *({"dtype": d, "page_size": p} for d in ATOL for p in (None, 16, 48)),
    *({"page_size": p} for p in (32, 128)),
    *(
        {"indices": [[2, 9, 10, 11], [0]], "kv_heads": heads, "group": group}
        for heads, group in [(1, 1), (3, 1), (3, 3), (1, 8), (2, 7), (1, 40)]
    ),
    *(
        {"indices": [[0, 7, 18]], "kv_heads": 1, "dim": dim, "value_dim": value_dim}
        for dim, value_dim in [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256), (16, 24)]
    ),
    *(
        {"indices": [index]}
        for index in ([0], [63], range(64), range(65), range(15, 33), _EDGES, [0, 63])
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tile", [SMALL, WIDE], ids=["16x16", "32x64"])
def test_every_layout(layout: dict[str, Any], tile: Tile) -> None:
    check_both(make_case(**{"indices": RAGGED, **layout}), tile)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(
    ("splits", "dtype"),
    [(2, torch.float32), (4, torch.float16), (4, torch.bfloat16), (7, torch.float32)],
)
def test_splits_are_joined(splits: int, dtype: torch.dtype, page_size: int | None) -> None:
    case = make_case(RAGGED, page_size=page_size, dtype=dtype)
    check(case, on_triton(case, SMALL, splits))


def _sinks(heads: int) -> torch.Tensor:
    return torch.linspace(-3, 3, heads, device=DEVICE)


SCORINGS = {
    "window of itself": Scoring(window=1),
    "window": Scoring(window=7),
    "window beyond all": Scoring(window=500),
    "chunks": Scoring(chunk=8),
    "chunks that no tile's end meets": Scoring(chunk=13),
    "capped": Scoring(softcap=0.5),
    "sinks": Scoring(sinks=_sinks(4)),
    "all of them": Scoring(window=19, softcap=2.0, sinks=_sinks(4)),
}


@pytest.mark.parametrize(
    ("page_size", "splits", "dtype"),
    [(None, 3, torch.float32), (16, 1, torch.float32), (16, 2, torch.float16)],
)
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_every_scoring(
    scoring: Scoring, page_size: int | None, splits: int, dtype: torch.dtype
) -> None:
    case = make_case(RAGGED, page_size=page_size, dtype=dtype)
    check_both(case, SMALL if dtype == torch.float32 else WIDE, splits, scoring)


PICTURES = [(4, 18), (30, 33), (33, 60)]


@pytest.mark.parametrize(
    ("page_size", "splits", "dtype"),
    [(None, 1, torch.float32), (16, 2, torch.bfloat16)],
)
@pytest.mark.parametrize("scoring", [PLAIN, *SCORINGS.values()], ids=["plain", *SCORINGS])
def test_the_positions_of_a_picture_see_each_other(
    scoring: Scoring, page_size: int | None, splits: int, dtype: torch.dtype
) -> None:
    indices = [[0, 3, 4, 5, 17, 40], [], [11], list(range(20)), [29, 30, 31, 32], [50]]
    case = make_case(indices, page_size=page_size, dtype=dtype, pictures=PICTURES)
    check_both(case, SMALL if dtype == torch.float32 else WIDE, splits, scoring)
    assert case.batch.packed().kv_lens == case.batch.kv_lens == (60, 0, 18, 20, 33, 60)


@pytest.mark.parametrize("scoring", [PLAIN, Scoring(window=24)], ids=["all", "window"])
def test_a_picture_is_seen_as_a_dense_mask_says(scoring: Scoring) -> None:
    """The reference too: beside attention with a mask over everything."""
    case = make_case([list(range(64))], group=1, pictures=PICTURES)
    at = torch.arange(64)
    seen = at[None] <= at[:, None]
    for start, end in PICTURES:
        seen[start:end, start:end] = True
    if scoring.window is not None:
        seen &= at[None] > at[:, None] - scoring.window
    query = case.query.cpu().transpose(0, 1)
    key, value = (x[case.table[0, 0], :, :64].cpu() for x in (case.key, case.value))
    dense = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=case.scale)
    torch.testing.assert_close(want(case, scoring), dense.transpose(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_keys_out_of_the_window_are_not_even_read(backend: str) -> None:
    """A layer with a window may lack what is before it."""
    case = make_case([[40], list(range(30, 44))])
    scoring = Scoring(window=6)
    for request, first in enumerate((35, 25)):
        page = case.table[request, 0]
        # What a tile of keys has beside the first that is seen is read, and weighs nothing.
        case.key[page, :, : first // 16 * 16] = float("nan")
        case.value[page, :, : first // 16 * 16] = float("nan")
    got = on_triton(case, SMALL, 1, scoring) if backend == "triton" else on("torch", case, scoring)
    assert not got.isnan().any()


def test_what_is_no_scoring_is_refused() -> None:
    for match, arguments in (
        ("window is 0", {"window": 0}),
        ("chunk is -1", {"chunk": -1}),
        ("softcap is 0", {"softcap": 0.0}),
        ("not both", {"window": 4, "chunk": 4}),
    ):
        with pytest.raises(ValueError, match=match):
            Scoring(**arguments)
    _refused("sinks are \\[4 heads\\]", scoring=Scoring(sinks=_sinks(3)))


@st.composite
def _scorings(draw: st.DrawFn, heads: int) -> Scoring:
    span = draw(st.sampled_from(["window", "chunk", None]))
    return Scoring(
        **({span: draw(st.integers(1, 90))} if span else {}),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
        sinks=_sinks(heads) if draw(st.booleans()) else None,
    )


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Case, Tile, int, Scoring]:
    requests = []
    for _ in range(draw(st.integers(1, 3))):
        chosen = draw(st.sets(st.integers(0, 70), max_size=12))
        run = draw(st.integers(0, 20))
        start = draw(st.integers(0, 50))
        requests.append(sorted(chosen | set(range(start, start + run))))
    if not any(requests):
        requests[0] = [draw(st.integers(0, 70))]
    case = make_case(
        requests,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 5)),
        dim=draw(st.sampled_from([16, 32, 40])),
        page_size=draw(st.sampled_from([None, 16, 24, 64])),
        dtype=draw(st.sampled_from(list(ATOL))),
        seed=draw(st.integers(0, 1000)),
        pictures=draw(st.sampled_from([(), PICTURES])),
    )
    scoring = draw(_scorings(case.query.shape[1]))
    return case, draw(st.sampled_from([SMALL, WIDE])), draw(st.integers(1, 3)), scoring


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=_cases())
def test_any_shape(drawn: tuple[Case, Tile, int, Scoring]) -> None:
    check_both(*drawn)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_later_key_weighs_nothing(backend: str) -> None:
    """Keys between two queries scream; the earlier query, in the same tile, must not hear."""
    case = make_case([[5, 40]], group=1)
    case.query[1] = case.query[0]
    quiet = on(backend, case)
    page = case.table[0, 0]
    case.key[page, :, 6:41] = 1000.0 * case.query[0][:, None]
    case.value[page, :, 6:41] = 1e6
    loud = on(backend, case)
    torch.testing.assert_close(loud[0], quiet[0], atol=1e-6, rtol=0)
    assert (loud[1] > 1e5).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_nan_that_is_seen_is_shown(backend: str) -> None:
    case = make_case([[5, 40]])
    case.value[case.table[0, 0], :, 20] = float("nan")
    assert on(backend, case)[1].isnan().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strides_do_not_matter(backend: str) -> None:
    """Queries as transformers hands them on, K/V as vLLM stores them."""
    case = make_case(RAGGED, page_size=16)
    query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.key, case.value))
    assert not query.is_contiguous() and not key.is_contiguous()
    check(case, on(backend, replace(case, query=query, key=key, value=value)))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("indices", [[], [[]], [[], []]], ids=str)
def test_nothing_to_compute(backend: str, indices: list[list[int]]) -> None:
    batch = RaggedQueries(
        [torch.tensor(i, dtype=torch.int64) for i in indices],
        torch.zeros(len(indices), 1, dtype=torch.int32),
    )
    kv = torch.zeros(1, 2, 8, 16)
    out = dispatch.partial_attention(torch.zeros(0, 4, 16), kv, kv, batch, 1.0, backend)
    assert out.shape == (0, 4, 16)


# -- what is refused ----------------------------------------------------------------------------


def _refused(match: str, **changed: Any) -> None:
    case = make_case([[0, 3]])
    arguments = {
        "query": case.query,
        "key": case.key,
        "value": case.value,
        "batch": case.batch,
        "scale": 1.0,
        **changed,
    }
    with pytest.raises(ValueError, match=match):
        dispatch.partial_attention(**arguments)


def test_what_does_not_fit_is_refused() -> None:
    case = make_case([[0, 3]])
    _refused("are \\[pages", key=case.key[0])
    _refused("2 queries|3 queries", query=case.query[:1].repeat(3, 1, 1))
    _refused("differ in pages", value=case.value[:1])
    _refused("query dim", query=case.query[..., :16])
    _refused("evenly", query=case.query[:, :3])
    _refused("differ in dtype", query=case.query.half())
    _refused("dense", query=case.query.transpose(1, 2).contiguous().transpose(1, 2))
    wide = torch.zeros(*case.value.shape[:3], 300)
    _refused("above 256", value=wide, backend="triton")


def test_a_batch_that_does_not_fit_is_refused() -> None:
    index = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="block_table"):
        RaggedQueries([index], torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="integer"):
        RaggedQueries([index.float()], torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="one entry for each"):
        RaggedQueries([index], torch.zeros(1, 1, dtype=torch.int32), sees=[index[:1]])


# -- the torch path's shape ---------------------------------------------------------------------


def test_the_torch_path_makes_no_mask_over_all_queries_and_keys() -> None:
    index = torch.arange(0, 2000, 2)
    batch = RaggedQueries([index], torch.zeros(1, 1, dtype=torch.int32))
    masks = [m for m in batch.masks(torch.float32) if m is not None]
    assert max(len(m) for m in masks) == CHUNK
    assert sum(m.numel() for m in masks) < 0.55 * len(index) * 2000


def test_a_window_makes_no_mask_beyond_it() -> None:
    index = torch.arange(2000)
    batch = RaggedQueries([index], torch.zeros(1, 1, dtype=torch.int32))
    masks = [m for m in batch.masks(torch.float32, Scoring(window=64)) if m is not None]
    assert max(m.shape[1] for m in masks) < 64 + CHUNK


def test_a_whole_prompt_and_single_queries_need_no_mask() -> None:
    indices = [torch.arange(200), torch.tensor([77]), torch.tensor([0])]
    batch = RaggedQueries(indices, torch.arange(3, dtype=torch.int32)[:, None])
    assert batch.masks(torch.float32) == (None, None, None)
    assert [chunk.kv_len for chunk in batch.chunks()] == [200, 78, 1]
    assert batch.kv_lens == (200, 78, 1)
