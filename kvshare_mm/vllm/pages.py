"""Reading token KV out of vLLM's pages, whatever the backend packs into them.

vLLM's logical view of a layer's cache is ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``,
but only the backend that writes a page knows where a token's numbers are in it: the CPU's keeps the
keys of a block transposed. So the backend is asked: tokens whose every number names itself are
written into a scratch page through the backend's own write, and the page is searched for them.
"""

from __future__ import annotations

from typing import Any

import torch

# Numbers are written as digits to a base that even bfloat16 holds exactly.
_BASE = 128


class PageLayout:
    """Where K and V of a token are in one head's page.

    Args:
        layer: a vLLM attention layer, its cache bound; layers of one cache group are alike.

    Raises:
        ValueError: the pages do not hold each number once.
    """

    def __init__(self, layer: Any) -> None:
        _, self._heads, self._block_size, width = layer.kv_cache.shape
        self._dim = width // 2
        self._key = self._find(layer, keys=True)
        self._value = self._find(layer, keys=False)

    def read(self, cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens.

        Args:
            cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]`` of a layer.
            slots: ``[n]`` int64, block times block size plus offset.

        Returns:
            Two ``[num_kv_heads, n, head_dim]``, on the cache's device.
        """
        blocks, row = torch.unique(slots // self._block_size, return_inverse=True)
        pages = cache[blocks].reshape(len(blocks), self._heads, -1)
        offset = slots % self._block_size

        def of(where: torch.Tensor) -> torch.Tensor:
            return pages[:, :, where].transpose(0, 1)[:, row, offset]

        return of(self._key), of(self._value)

    def _find(self, layer: Any, *, keys: bool) -> torch.Tensor:
        """``[block_size, head_dim]`` flat index in a head's page."""
        size, dim = self._block_size, self._dim
        cache = layer.kv_cache
        names = torch.arange(1, size * dim + 1, device=cache.device)
        found = torch.zeros(2 * size * dim, dtype=torch.int64, device=cache.device)
        weight = 1
        while weight <= size * dim:
            digit = (names // weight % _BASE).view(size, 1, dim).expand(-1, self._heads, -1)
            filled = digit.to(cache.dtype).contiguous()
            empty = torch.zeros_like(filled)
            scratch = torch.zeros((2, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
            slots = torch.arange(size, device=cache.device) + size
            k, v = (filled, empty) if keys else (empty, filled)
            layer.impl.do_kv_cache_update(layer, k, v, scratch, slots)
            found += weight * scratch[1, 0].reshape(-1).to(torch.int64)
            weight *= _BASE
        where = found.nonzero().flatten()
        order = found[where] - 1
        if len(where) != size * dim or not torch.equal(order.sort().values, names - 1):
            raise ValueError("the attention backend does not keep each number of K and V once")
        index = torch.empty_like(where)
        index[order] = where
        return index.view(size, dim)
