"""KV is read out of pages as it was written, whatever the layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from kvshare_mm.vllm.latents import LatentPages
from kvshare_mm.vllm.pages import PageLayout

pytestmark = pytest.mark.vllm

HEADS = 2
ROTATED, OF_HEAD = 8, 12  # channels of an MLA layer


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


class LatentLayer(SimpleNamespace):
    """What the CPU's attention does to latents."""

    def __init__(self, dim: int, block: int) -> None:
        super().__init__(
            kv_lora_rank=dim,
            qk_rope_head_dim=ROTATED,
            num_heads=HEADS,
            kv_cache=torch.zeros(6, block, dim + ROTATED, dtype=torch.bfloat16),
            kv_cache_dtype="auto",
            _k_scale=torch.ones(()),
            W_UK_T=torch.randn(HEADS, OF_HEAD, dim),
            impl=SimpleNamespace(do_kv_cache_update=self.update),
        )

    def update(self, *args: Any) -> None:
        CPUMLAImpl.do_kv_cache_update(None, *args)  # type: ignore[arg-type]


class Float8Layer(CPULayer):
    """Keeps bytes, and rounds towards zero."""

    def __init__(self, dtype: torch.dtype, dim: int, block: int) -> None:
        super().__init__(dtype, dim, block)
        self.kv_cache, self.dtype = self.kv_cache.to(torch.uint8), dtype
        self.kv_cache_dtype, self._k_scale, self._v_scale = "fp8", *torch.tensor([0.37, 1.7])
        self._isa = _get_attn_isa(dtype, block, dim, "fp8")

    def update(self, layer: Any, k: Any, v: Any, cache: Any, slots: torch.Tensor) -> None:
        blocks, heads, size, _ = cache.shape
        keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        scales = {"k_scale": self._k_scale.item(), "v_scale": self._v_scale.item()}
        ops.cpu_attn_reshape_and_cache(
            k, v, keys, values, slots, self._isa, **scales, kv_cache_dtype="fp8"
        )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_is_read_and_written_as_bytes(dtype: torch.dtype) -> None:
    layer, length = Float8Layer(dtype, 64, 32), 80
    k, v = (torch.randn(length, HEADS, 64).to(dtype) for _ in range(2))
    blocks = torch.tensor([4, 1, 2])
    slots = (blocks[:, None] * 32 + torch.arange(32)).flatten()[:length]
    layer.update(layer, k, v, layer.kv_cache, slots)
    pages, kept = PageLayout(layer), layer.kv_cache.clone()
    found = pages.read(layer.kv_cache, blocks, length)
    for x, seen, scale in zip((k, v), found, (0.37, 1.7), strict=True):
        back = seen.float() * scale
        assert torch.allclose(back, x.transpose(0, 1).float(), rtol=1 / 8, atol=scale / 512)
    layer.kv_cache.zero_()
    pages.write(layer, *(x.transpose(0, 1).contiguous() for x in found), slots)
    assert torch.equal(layer.kv_cache, kept)
    query = torch.randn(1, 4 * 64).to(dtype)
    heads, keys = pages.scored(layer, query, *found)
    assert heads.shape == (4, 1, 64) and keys.dtype == dtype
    assert torch.allclose(keys.float(), found[0].float() * 0.37, rtol=1e-2)


def test_bytes_of_another_kind_are_refused() -> None:
    layer = Float8Layer(torch.float32, 32, 32)
    layer.kv_cache_dtype = "int8_per_token_head"
    with pytest.raises(ValueError, match="int8_per_token_head"):
        PageLayout(layer)


def test_a_backend_that_loses_numbers_is_found_out() -> None:
    layer = CPULayer(torch.float32, 32, 32)
    write = layer.update

    def lossy(layer: Any, k: Any, v: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        write(layer, k, v, cache, slots)
        cache[:, :, 0, 0] = 0

    layer.impl.do_kv_cache_update = lossy
    with pytest.raises(ValueError, match="once"):
        PageLayout(layer)


def test_latents_are_read_as_they_were_written() -> None:
    layer = LatentLayer(24, 16)
    k, v = (torch.randn(37, 1, dim).bfloat16() for dim in (24, ROTATED))
    blocks = torch.tensor([4, 1, 2])
    slots = (blocks[:, None] * 16 + torch.arange(16)).flatten()[:37]
    pages = LatentPages(layer)
    pages.write(layer, k, v, slots)
    found_k, found_v = pages.read(layer.kv_cache, blocks, 37)
    assert torch.equal(found_k, k.transpose(0, 1))
    assert torch.equal(found_v, v.transpose(0, 1))


def test_scores_are_those_of_the_keys_that_latents_become() -> None:
    layer = LatentLayer(24, 16)
    query, k, v = torch.randn(1, HEADS, OF_HEAD + ROTATED), torch.randn(7, 24), torch.randn(7, 8)
    turned, latents = LatentPages(layer).scored(layer, query, k[None], v[None])
    keys = torch.einsum("nl,hdl->hnd", k, layer.W_UK_T)
    keys = torch.cat((keys, v.expand(HEADS, 7, ROTATED)), -1)
    want = torch.einsum("hd,hnd->hn", query[0], keys)
    assert torch.allclose((turned @ latents.transpose(1, 2))[:, 0], want, atol=1e-4)


def test_backends_that_keep_latents_otherwise_are_found_out() -> None:
    layer = LatentLayer(24, 16)
    layer.W_UK_T = None
    with pytest.raises(ValueError, match="packs the weights"):
        LatentPages(layer)
    layer.impl.do_kv_cache_update = lambda *_: None
    with pytest.raises(ValueError, match="as they are"):
        LatentPages(layer)
