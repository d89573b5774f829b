"""Pages of multi-head latent attention: a token has one row, its latent and one rotated key.

As in the native engine, the latent is what is stored as K, and the key that all heads share as V:
of a row that moves only the latter turns (`RotarySpec.of_values`).
"""

from __future__ import annotations

from typing import Any

import torch

from kvshare_mm.vllm import compat


class LatentPages:
    """Latents in pages, see `Pages`; ``[num_blocks, block_size, latent_dim + rotary_dim]``.

    Args:
        layer: one of vLLM's MLA layers, its cache bound; layers of one cache group are alike.

    Raises:
        ValueError: rows are not kept as they are, or the weights that scores are made with are not
            there.
    """

    num_kv_heads = 1

    def __init__(self, layer: Any) -> None:
        self.dtype = layer.kv_cache.dtype
        self.key_dim, self.value_dim = int(layer.kv_lora_rank), int(layer.qk_rope_head_dim)
        _, size, width = layer.kv_cache.shape
        rows = torch.arange(size * width, device=layer.kv_cache.device).remainder(128)
        rows = rows.to(layer.kv_cache.dtype).view(size, width)
        scratch = torch.zeros_like(layer.kv_cache[:2])
        slots = torch.arange(size, device=rows.device) + size
        k, v = (x[:, None].contiguous() for x in rows.split((self.key_dim, self.value_dim), -1))
        compat.write_latents(layer, k, v, scratch, slots)
        if not torch.equal(scratch[1], rows):
            raise ValueError("the attention backend does not keep latents as they are")
        if compat.key_weights(layer) is None:
            raise ValueError("the attention backend packs the weights that queries are turned by")

    def read(
        self, cache: torch.Tensor, block_ids: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = cache[block_ids].flatten(0, 1)[None, :length]
        return rows[..., : self.key_dim], rows[..., self.key_dim :]

    def write(self, layer: Any, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        compat.write_latents(layer, k, v, layer.kv_cache, slots)

    def scored(
        self, layer: Any, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As a decode does it: the query goes to the latents, they need not become keys."""
        weights = compat.key_weights(layer)
        assert weights is not None
        heads = query.view(layer.num_heads, 1, -1)
        still, turned = heads.split((weights.shape[1], self.value_dim), -1)
        return torch.cat((still @ weights, turned), -1), torch.cat((k, v), -1)
