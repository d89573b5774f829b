"""KV in eight bits: how far it is rounded, and that rows stand for themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.kernels.q8 import exponents_of, pack, packed_width, scales_of, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(row: torch.Tensor) -> list[float]:
    """Q8_0 of one row, value by value: ggml's `quantize_row_q8_0_ref`."""
    out: list[float] = []
    values = row.double().tolist()
    for start in range(0, len(values), 32):
        group = values[start : start + 32]
        scale = float(np.float16(np.float32(max(map(abs, group))) / np.float32(127)))
        for x in group:
            steps = round(x / scale) if scale else 0
            out.append(max(-127, min(127, steps)) * scale)
    return out


@settings(max_examples=60)
@given(
    dim=st.integers(1, 130),
    rows=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-9, 1e-3, 1.0, 300.0]),
    outlier=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_the_reference_to_a_step(
    dim: int, rows: int, dtype: torch.dtype, size: float, outlier: bool, seed: int
) -> None:
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * size
    if outlier:
        values[:, dim // 2] *= 20
    values = values.to(dtype)
    packed = pack(values)
    assert packed.dtype == torch.int8 and packed.shape == (rows, packed_width(dim))
    found = unpack(packed, dim, torch.float64)
    want = torch.tensor([reference(row) for row in values], dtype=torch.float64)
    steps = scales_of(packed).double().expand(-1, -1, 32).flatten(1)[:, :dim]
    # Both may round a value in the middle between two steps to another side.
    assert ((found - want).abs() <= steps * 1.001 + 1e-12).all()
    assert ((found - want).abs() > 1e-6 * steps).double().mean() < 0.05
    # Half a step; the scale's own rounding to float16, or below what float16 has, at the edge.
    assert ((found - values.double()).abs() <= steps * 0.57 + 127 * 2.0**-24).all()


def test_rows_stand_for_themselves() -> None:
    values = torch.randn(3, 2, 7, 64)
    packed = pack(values)
    assert torch.equal(packed[:, :, 2:5], pack(values[:, :, 2:5].clone()))
    assert torch.equal(
        unpack(packed[:, :, 3:4], 64, torch.float32), unpack(packed, 64, torch.float32)[:, :, 3:4]
    )


def test_an_outlier_takes_the_precision_of_its_group_alone() -> None:
    values = torch.randn(50, 64)
    values[:, 40] = 200
    found = unpack(pack(values), 64, torch.float32)
    assert (found - values)[:, :32].abs().max() < 0.02
    assert (found - values)[:, 32:].abs().max() > 0.5


def test_channels_of_different_size_keep_their_own_precision() -> None:
    sizes = torch.tensor([2.0**i for i in range(-8, 9)]).repeat(4)[:64]
    keys = torch.randn(3, 2, 200, 64) * sizes
    exponents = exponents_of(keys)
    assert exponents.dtype == torch.int8 and exponents.shape == (3, 2, 64)
    found = unpack(pack(keys, exponents), 64, torch.float32, exponents)
    assert ((found - keys).abs() / sizes).max() < 0.05
    plain = unpack(pack(keys), 64, torch.float32)
    assert ((plain - keys).abs() / sizes).max() > 0.5


@pytest.mark.parametrize("largest", [0.0, 1e-38, 3e30])
def test_channels_at_the_edges(largest: float) -> None:
    keys = torch.full((2, 5, 64), largest)
    exponents = exponents_of(keys)
    found = unpack(pack(keys, exponents), 64, torch.float32, exponents)
    assert torch.allclose(found, keys, rtol=0.01, atol=1e-36)


def test_no_rows() -> None:
    none = torch.empty(2, 1, 0, 64)
    exponents = exponents_of(none)
    assert unpack(pack(none, exponents), 64, torch.bfloat16, exponents).shape == (2, 1, 0, 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_what_is_no_number_is_seen_in_the_scales(bad: float) -> None:
    values = torch.randn(4, 64)
    values[2, 33] = bad
    assert (~torch.isfinite(scales_of(pack(values)))).nonzero().tolist() == [[2, 1, 0]]
