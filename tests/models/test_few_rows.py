"""Linear layers compute few rows in another way, and the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

from kvshare_mm.models import few_rows
from kvshare_mm.models.few_rows import FewRowsLinear, speed_up

Chosen = Callable[[set[int]], None]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """Decides for which numbers of rows the other way is faster."""
    monkeypatch.setattr(few_rows, "_measured", {})

    def choose(rows: set[int]) -> None:
        def is_faster(_: Sequence[torch.Tensor], x: torch.Tensor) -> bool:
            return len(x) in rows

        monkeypatch.setattr(few_rows, "_is_faster", is_faster)

    return choose


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 320), (3, 320), (1, 2, 320), (1, 1, 4, 320), (1, 9, 320)])
def test_the_product_is_the_same(shape: tuple[int, ...], bias: bool, chosen: Chosen) -> None:
    torch.manual_seed(0)
    chosen({1, 2, 3, 4})
    layer, x = nn.Linear(320, 256, bias=bias), torch.randn(shape)
    expected = functional.linear(x, layer.weight, layer.bias)
    speed_up(layer)
    assert isinstance(layer, FewRowsLinear)
    found = layer(x)
    assert found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_take_the_way_that_is_faster_for_them(
    chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen({2})
    layer = nn.Linear(320, 256)
    speed_up(layer)
    turned = []
    other = few_rows._turned
    monkeypatch.setattr(
        few_rows, "_turned", lambda x, weight: turned.append(len(x)) or other(x, weight)
    )
    for rows in (1, 2, 3, 4, 5):
        layer(torch.ones(rows, 320))
    assert turned == [2]


def test_all_layers_of_a_shape_are_one_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_measured", {})
    measured: list[int] = []

    def is_faster(weights: Sequence[torch.Tensor], x: torch.Tensor) -> bool:
        measured.append(sum(weight.numel() for weight in weights))
        return True

    monkeypatch.setattr(few_rows, "_is_faster", is_faster)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 400))
    speed_up(model)
    assert measured == [2 * 300 * 300] * 4 + [300 * 400] * 4
    assert all(isinstance(layer, FewRowsLinear) for layer in model)
    again = nn.Linear(300, 400)
    speed_up(again)
    assert isinstance(again, FewRowsLinear) and len(measured) == 8


def test_a_measurement_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_measured", {})
    monkeypatch.setattr(few_rows, "_AT_ONCE", 10_000)
    monkeypatch.setattr(few_rows, "_OF_ALL", 25_000)
    measured: list[int] = []

    def is_faster(weights: Sequence[torch.Tensor], x: torch.Tensor) -> bool:
        measured.extend(weight.numel() for weight in weights)
        return False

    monkeypatch.setattr(few_rows, "_is_faster", is_faster)
    layer = nn.Linear(400, 1000)
    speed_up(layer)
    assert measured == [10_000, 10_000] * 4
    assert type(layer) is nn.Linear


def test_other_layers_stay(chosen: Chosen) -> None:
    class Quantised(nn.Linear):
        pass

    chosen({1, 2, 3, 4})
    model = nn.ModuleList(
        [nn.Linear(16, 16), nn.Linear(320, 256, dtype=torch.bfloat16), Quantised(320, 256)]
    )
    speed_up(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, Quantised]


def test_both_ways_are_timed() -> None:
    """Which one is faster is the machine's; that one of them can win is not."""
    weights, x = [torch.ones(300, 300)] * 3, torch.ones(2, 300)
    slow = few_rows._turned

    def slower(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return max((slow(x, weight) for _ in range(200)), key=torch.Tensor.sum)

    original, few_rows._turned = few_rows._turned, slower
    try:
        assert not few_rows._is_faster(weights, x)
    finally:
        few_rows._turned = original
