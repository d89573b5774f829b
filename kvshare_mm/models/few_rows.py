"""Linear layers that are fast for a few rows on a CPU: an answer's next token, and its draft.

``x @ weight.T`` of two or three rows may take two or three times as long as of one: the library's
product is made for many rows and copies the weights first. ``(weight @ x.T).T`` is the same
product, and with few rows it reads the weights once; of one row, doubled, it may be faster, too.
Which one is depends on the processor and on the weights' shape, so that it is measured.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional

_MOST = 4  # rows; with more the usual product wins
_CLEARLY = 0.9  # of the usual product's time
_SMALL = 1 << 16  # elements of a weight, with fewer of which nothing is to be gained
# Elements of weights that a measurement reads, at once and in all: as many as a processor does not
# keep beside it, as an answer's next token finds them.
_AT_ONCE, _OF_ALL = 1 << 20, 1 << 23
_REPEATS = 5


class FewRowsLinear(nn.Linear):
    """A linear layer with two ways to compute it.

    Attributes:
        turned: numbers of rows for which `_turned` is faster.
    """

    turned: frozenset[int] = frozenset()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.shape[:-1].numel()
        if rows not in self.turned or not _measurable(self.weight):
            return super().forward(input)
        out = _turned(input.reshape(rows, -1), self.weight)
        if self.bias is not None:
            out += self.bias  # of its dtype, which autocast may have made another
        return out.reshape(*input.shape[:-1], -1)


def speed_up(model: nn.Module) -> None:
    """Let a model's linear layers compute few rows in the way that is faster here.

    Nothing changes but rounding, which may be another one after a restart, and nothing at all where
    weights are not float32 on a CPU. Layers of other kinds, quantised ones for example, stay as
    they are.
    """
    alike: dict[torch.Size, list[nn.Linear]] = defaultdict(list)
    for layer in model.modules():
        if (
            type(layer) is nn.Linear
            and type(layer.weight) is nn.Parameter
            and _measurable(layer.weight)
            and layer.weight.numel() >= _SMALL
        ):
            alike[layer.weight.shape].append(layer)
    for layers in alike.values():
        if turned := _faster([layer.weight for layer in layers]):
            for layer in layers:
                layer.__class__ = FewRowsLinear
                layer.turned = turned  # type: ignore[assignment]


def _measurable(weight: torch.Tensor) -> bool:
    """Whether measurements are of weights like these: a model may be moved after them."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[n, out]``: the product of ``[n, in]`` and ``[out, in]`` as one of many rows and few
    columns."""
    rows = len(x)
    if rows == 1:
        x = x.expand(2, -1).contiguous()
    return torch.mm(weight, x.t()).t()[:rows].contiguous()


# By shape and threads: models that are loaded in one process compute alike.
_measured: dict[tuple[torch.Size, int], frozenset[int]] = {}


def _faster(weights: Sequence[torch.Tensor]) -> frozenset[int]:
    """Numbers of rows for which `_turned` is faster with weights of one shape."""
    key = weights[0].shape, torch.get_num_threads()
    if key not in _measured:
        width = key[0][1]
        parts = [part for w in weights for part in w.split(max(1, _AT_ONCE // width))]
        read = accumulate(part.numel() for part in parts)
        parts = [part for part, so_far in zip(parts, read, strict=True) if so_far <= _OF_ALL]
        _measured[key] = frozenset(
            rows for rows in range(1, _MOST + 1) if _is_faster(parts, torch.ones(rows, width))
        )
    return _measured[key]


@torch.inference_mode()
def _is_faster(weights: Sequence[torch.Tensor], x: torch.Tensor) -> bool:
    best = {functional.linear: float("inf"), _turned: float("inf")}
    for _ in range(_REPEATS):
        for way in (functional.linear, _turned):
            start = time.perf_counter()
            for weight in weights:
                way(x, weight)
            best[way] = min(best[way], time.perf_counter() - start)
    return best[_turned] < _CLEARLY * best[functional.linear]
