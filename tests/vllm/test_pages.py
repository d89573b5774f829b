"""KV is read out of pages as it was written, whatever the layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvshare_mm.vllm.pages import PageLayout

pytestmark = pytest.mark.vllm

HEADS = 2


class CPULayer:
    """What the CPU's attention does to its pages, without a model."""

    def __init__(self, dtype: torch.dtype, dim: int, block: int) -> None:
        self.kv_cache = torch.zeros(6, HEADS, block, 2 * dim, dtype=dtype)
        self._isa = _get_attn_isa(dtype, block, dim, "auto")
        self.impl = SimpleNamespace(do_kv_cache_update=self.update)

    def update(self, layer: Any, k: Any, v: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        blocks, heads, size, _ = cache.shape
        keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        scales = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, self._isa, **scales)


class PackedLayer(CPULayer):
    """Numbers all over the page, as no stride describes."""

    def __init__(self, dtype: torch.dtype, dim: int, block: int) -> None:
        super().__init__(dtype, dim, block)
        self._order = torch.randperm(2 * block * dim, generator=torch.Generator().manual_seed(0))

    def update(self, layer: Any, k: Any, v: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        size, dim = cache.shape[2], cache.shape[3] // 2
        flat = cache.view(cache.shape[0], HEADS, -1)
        for i, slot in enumerate(slots.tolist()):
            at = torch.arange(dim) + slot % size * dim
            flat[slot // size][:, self._order[at]] = k[i]
            flat[slot // size][:, self._order[at + size * dim]] = v[i]


@pytest.mark.parametrize(
    ("kind", "dtype", "dim", "block"),
    [
        (CPULayer, torch.float32, 64, 128),
        (CPULayer, torch.float32, 32, 32),
        (CPULayer, torch.bfloat16, 128, 128),
        (CPULayer, torch.bfloat16, 64, 32),
        (PackedLayer, torch.float32, 16, 8),
    ],
)
def test_what_was_written_is_read(kind: Any, dtype: torch.dtype, dim: int, block: int) -> None:
    layer = kind(dtype, dim, block)
    length = 2 * block + block // 2
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(length, HEADS, dim, generator=generator).to(dtype) for _ in range(2))
    blocks = torch.tensor([4, 1, 2])
    slots = (blocks[:, None] * block + torch.arange(block)).flatten()[:length]
    layer.update(layer, k, v, layer.kv_cache, slots)
    found_k, found_v = PageLayout(layer).read(layer.kv_cache, blocks, length)
    assert torch.equal(found_k, k.transpose(0, 1))
    assert torch.equal(found_v, v.transpose(0, 1))


def test_a_backend_that_loses_numbers_is_found_out() -> None:
    layer = CPULayer(torch.float32, 32, 32)
    write = layer.update

    def lossy(layer: Any, k: Any, v: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        write(layer, k, v, cache, slots)
        cache[:, :, 0, 0] = 0

    layer.impl.do_kv_cache_update = lossy
    with pytest.raises(ValueError, match="once"):
        PageLayout(layer)
