"""Reading token KV out of vLLM's pages, whatever the backend packs into them.

vLLM's logical view of a layer's cache is ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``,
but only the backend that writes a page knows where a token's numbers are in it: the CPU's keeps the
keys of a block transposed. So the backend is asked: tokens whose every number names itself are
written into a scratch page through the backend's own write, and the page is searched for them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from kvshare_mm.vllm import compat

# Numbers are written as digits to a base that even bfloat16 holds exactly, and float8.
_BASE, _BASE_OF_FLOAT8 = 128, 16
# Some backends round to float8 towards zero: this much more, and a digit stays what it is.
_MORE = 1 + 1 / 64


class Pages(Protocol):
    """K and V of tokens in the pages of a model's layers, which are alike.

    Attributes:
        dtype: of what is read and written; float8 is in units of its layer's scale.
        num_kv_heads, key_dim, value_dim: of a token's K and V.
    """

    dtype: torch.dtype
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def read(
        self, cache: torch.Tensor, block_ids: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a request's positions ``[0, length)``.

        Args:
            cache: a layer's.
            block_ids: ``[ceil(length / block_size)]`` its blocks in order, on the cache's device.

        Returns:
            ``[num_kv_heads, length, key_dim]`` and ``[num_kv_heads, length, value_dim]``, on the
            cache's device.
        """

    def write(self, layer: Any, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Put K and V into a layer's pages.

        Args:
            k: ``[n, num_kv_heads, key_dim]``.
            v: ``[n, num_kv_heads, value_dim]``.
            slots: ``[n]`` int64.
        """

    def scored(
        self, layer: Any, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the scores of one query are made of.

        Args:
            query: of one token, as the layer is called with it.
            k, v: ``[num_kv_heads, N, dim]`` of a request.

        Returns:
            ``[num_heads, 1, dim]`` and ``[num_kv_heads, N, dim]``.
        """


class PageLayout:
    """Where K and V of a token are in one head's page.

    Float8 is read and written as the bytes that it is, without its scale: to turn keys needs none,
    and what is not turned stays the same.

    Args:
        layer: a vLLM attention layer, its cache bound; layers of one cache group are alike.

    Raises:
        ValueError: the pages do not hold each number once.
    """

    def __init__(self, layer: Any) -> None:
        _, self.num_kv_heads, self._block_size, width = layer.kv_cache.shape
        self.key_dim = self.value_dim = width // 2
        self._float8 = compat.float8(layer)
        self.dtype = self._float8 or layer.kv_cache.dtype
        self._key = self._find(layer, keys=True)
        self._value = self._find(layer, keys=False)
        self._key_strides, self._value_strides = _strides(self._key), _strides(self._value)

    def read(
        self, cache: torch.Tensor, block_ids: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pages = cache[block_ids].reshape(len(block_ids), self.num_kv_heads, -1)

        def of(where: torch.Tensor, strides: tuple[int, int] | None) -> torch.Tensor:
            if strides is None:
                found = pages[:, :, where]
            else:
                found = pages.as_strided(
                    (*pages.shape[:2], *where.shape),
                    (*pages.stride()[:2], *strides),
                    int(where[0, 0]),
                )
            heads = found.transpose(0, 1)
            heads = heads.reshape(self.num_kv_heads, -1, self.key_dim)[:, :length]
            return heads.view(self.dtype)

        return of(self._key, self._key_strides), of(self._value, self._value_strides)

    def write(self, layer: Any, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        cache = layer.kv_cache
        if self._float8 is None:
            layer.impl.do_kv_cache_update(layer, k, v, cache, slots)
            return
        width = cache.shape[-1]
        block, at = slots // self._block_size, slots % self._block_size
        head = torch.arange(self.num_kv_heads, device=cache.device)[:, None]
        for x, where in ((k, self._key), (v, self._value)):
            index = where[at][:, None]
            place = block[:, None, None], head, index // width, index % width
            cache[place] = x.view(torch.uint8)

    def scored(
        self, layer: Any, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = query.view(-1, 1, self.key_dim)
        if self._float8 is not None:
            k = k.to(query.dtype) * compat.scales(layer)[0].to(query.dtype).view(-1, 1, 1)
        return query, k

    def _find(self, layer: Any, *, keys: bool) -> torch.Tensor:
        """``[block_size, head_dim]`` flat index in a head's page."""
        size, dim = self._block_size, self.key_dim
        cache, base, dtype, unit = layer.kv_cache, _BASE, self.dtype, torch.ones(())
        if self._float8 is not None:
            base, dtype, unit = _BASE_OF_FLOAT8, layer.dtype, compat.scales(layer)[not keys] * _MORE
        names = torch.arange(1, size * dim + 1, device=cache.device)
        found = torch.zeros(2 * size * dim, dtype=torch.int64, device=cache.device)
        weight = 1
        while weight <= size * dim:
            digit = (names // weight % base).view(size, 1, dim).expand(-1, self.num_kv_heads, -1)
            filled = (digit * unit.to(cache.device).view(-1, 1)).to(dtype).contiguous()
            empty = torch.zeros_like(filled)
            scratch = torch.zeros((2, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
            slots = torch.arange(size, device=cache.device) + size
            k, v = (filled, empty) if keys else (empty, filled)
            layer.impl.do_kv_cache_update(layer, k, v, scratch, slots)
            found += weight * scratch[1, 0].reshape(-1).view(self.dtype).float().to(torch.int64)
            weight *= base
        where = found.nonzero().flatten()
        order = found[where] - 1
        if len(where) != size * dim or not torch.equal(order.sort().values, names - 1):
            raise ValueError("the attention backend does not keep each number of K and V once")
        index = torch.empty_like(where)
        index[order] = where
        return index.view(size, dim)


def _strides(where: torch.Tensor) -> tuple[int, int] | None:
    """Distances between tokens and between numbers, if they are the same all over a page: copying
    is several times faster than gathering."""
    first = where[0, 0]
    strides = int(where[1, 0] - first), int(where[0, 1] - first)
    rows, columns = (torch.arange(n, device=where.device) for n in where.shape)
    expected = first + rows[:, None] * strides[0] + columns * strides[1]
    return strides if torch.equal(expected, where) and min(strides) > 0 else None
