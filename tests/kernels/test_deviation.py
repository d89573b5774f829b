"""Deviation and the choice of the worst positions."""

from __future__ import annotations

import pytest
import torch

from kvshare_mm.kernels.dispatch import deviation, most_deviating
from kvshare_mm.kernels.edits import slot_mapping
from kvshare_mm.kernels.reference import deviation_reference

from .conftest import DEVICE

BACKENDS = ["triton", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(1, 1, 16), (3, 16, 64), (2, 37, 80)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_same_as_the_reference(
    backend: str, dtype: torch.dtype, heads: int, tokens: int, dim: int, page_size: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    table = torch.tensor([4, 1, 0, 2])
    new = torch.rand(heads, tokens, dim, generator=generator).to(dtype)
    stored = torch.full((5, heads, page_size, dim), float("nan"), dtype=dtype)
    slots = slot_mapping(torch.arange(5, 5 + tokens), table, page_size)
    stored[slots // page_size, :, slots % page_size] = torch.rand(
        tokens, heads, dim, generator=generator
    ).to(dtype)
    got = deviation(new.to(DEVICE), stored.to(DEVICE), slots.to(DEVICE), backend)
    assert got.dtype == torch.float32
    expected = deviation_reference(new, stored, slots)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=0, check_dtype=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_compare(backend: str) -> None:
    stored = torch.zeros(1, 2, 4, 16, device=DEVICE)
    slots = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert deviation(stored[0, :, :0], stored, slots, backend).shape == (0,)


def test_the_worst_come_in_order() -> None:
    deviations = torch.tensor([0.1, 3.0, 0.0, 2.0, float("nan"), 1.0])
    assert most_deviating(deviations, 3).tolist() == [1, 3, 4]
    assert most_deviating(deviations, 99).tolist() == list(range(6))
    assert most_deviating(deviations, 0).tolist() == []


def test_what_does_not_fit_is_refused() -> None:
    new, stored, slots = torch.zeros(2, 3, 16), torch.zeros(1, 2, 4, 16), torch.arange(3)
    for match, arguments in (
        ("new is", (new[0], stored, slots)),
        ("new is", (new, stored, slots[:2])),
        ("heads or dim", (new[:1], stored, slots)),
        ("dense", (new.transpose(1, 2).contiguous().transpose(1, 2), stored, slots)),
        ("int64", (new, stored, slots.int())),
    ):
        with pytest.raises(ValueError, match=match):
            deviation(*arguments)
