"""Linear layers compute few rows in another way, and the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

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


def test_rows_of_another_width_are_refused(chosen: Chosen) -> None:
    """As many numbers as one row has may be two rows that are too short."""
    chosen({1, 2, 3, 4})
    layer = nn.Linear(320, 256)
    speed_up(layer)
    for shape in ((2, 160), (640,), (1, 2, 160)):
        with pytest.raises(RuntimeError, match="shape"):
            layer(torch.ones(shape))


def test_what_autocast_computes_has_its_dtype(chosen: Chosen) -> None:
    chosen({2})
    layer, x = nn.Linear(320, 256), torch.randn(2, 320)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        speed_up(layer)
        found = layer(x)
    assert isinstance(layer, FewRowsLinear) and found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_layer_of_another_dtype_by_now_is_as_it_was(chosen: Chosen) -> None:
    chosen({1, 2, 3, 4})
    layer, x = nn.Linear(320, 256), torch.randn(2, 320, dtype=torch.bfloat16)
    speed_up(layer)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))


def test_copies_are_as_fast_and_new_ones_are_layers_too(chosen: Chosen) -> None:
    chosen({2})
    layer, x = nn.Linear(320, 256), torch.randn(2, 320)
    speed_up(layer)
    assert isinstance(layer, FewRowsLinear)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.turned == {2} and torch.equal(copied(x), layer(x))
    new = type(layer)(320, 256)
    new.load_state_dict(layer.state_dict())
    torch.testing.assert_close(new(x), layer(x))


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


def test_weights_of_other_kinds_stay(chosen: Chosen) -> None:
    """Quantised ones may be tensors that say they are float32, in a plain linear layer."""

    class Packed(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, what: Any, types: Any, args: Any = (), given: Any = None
        ) -> Any:
            if what in (torch.mm, torch.Tensor.split):
                raise NotImplementedError
            return super().__torch_function__(what, types, args, given or {})

    chosen({1, 2, 3, 4})
    layer = nn.Linear(320, 256)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    speed_up(layer)
    assert type(layer) is nn.Linear


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
