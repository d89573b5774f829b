"""The vision tower on many equal pictures at once: the same sums as transformers, in less time.

transformers embeds patches with a Conv3d over two equal frames and attends window by window in a
Python loop. Training sees only 112x112 pictures, so the two frames' weights are added up front and
all windows go through one attention call. ``tests/assets/test_training.py`` compares the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from kvshare_mm.assets.shop.pictures import SIZE

PATCH = 14
PATCHES = (SIZE // PATCH) ** 2  # 64 a picture
CELLS = PATCHES // 4  # 16 image tokens per picture


class FastTower:
    """Runs a ``Qwen2_5_VisionTransformerPretrainedModel`` on pictures of 112x112 pixels."""

    def __init__(self, visual: Any, mean: list[float], std: list[float]) -> None:
        self.visual = visual
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        grid = torch.tensor([[1, SIZE // PATCH, SIZE // PATCH]])
        merge = visual.spatial_merge_size
        order, seqlens = get_vision_window_index(
            grid,
            spatial_merge_size=merge,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        lengths = (seqlens[1:] - seqlens[:-1]).unique()
        if len(lengths) != 1:
            raise ValueError("windows of different sizes cannot be batched")
        self.window = int(lengths[0])
        self.order = (order[:, None] * merge**2 + torch.arange(merge**2)).reshape(-1)
        self.back = torch.argsort(order)
        positions = get_vision_position_ids(grid, merge)
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), positions)
        self.cos, self.sin = cos[self.order][:, None], sin[self.order][:, None]

    def patches(self, pictures: np.ndarray) -> Tensor:
        """uint8 [B, 112, 112, 3] → normalised patches [B, 64, 588], merged cells together."""
        x = (torch.from_numpy(pictures).float().div_(255) - self.mean) / self.std
        batch, n = len(pictures), SIZE // PATCH // 2
        x = x.view(batch, n, 2, PATCH, n, 2, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        return x.reshape(batch, PATCHES, 3 * PATCH * PATCH)

    def __call__(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 [B, 112, 112, 3] → image tokens [B, 16, H], patches in front of the last block.

        The second is [B, 16, 4 * hidden] in raster order of cells: what local labels hang on.
        """
        visual = self.visual
        weight = visual.patch_embed.proj.weight
        flat = weight.sum(2).reshape(weight.shape[0], -1)
        x = functional.linear(self.patches(pictures), flat)[:, self.order]
        batch = len(pictures)
        before_last = x
        for index, block in enumerate(visual.blocks):
            before_last = x
            length = PATCHES if index in visual.fullatt_block_indexes else self.window
            x = x + self._attend(block.attn, block.norm1(x), length)
            x = x + block.mlp(block.norm2(x))
        merged = visual.merger(x.reshape(batch * PATCHES, -1)).view(batch, CELLS, -1)
        local = before_last.reshape(batch, CELLS, -1)
        return merged[:, self.back], local[:, self.back]

    def _attend(self, attention: Any, x: Tensor, length: int) -> Tensor:
        batch, patches, hidden = x.shape
        q, k, v = attention.qkv(x).view(batch, patches, 3, attention.num_heads, -1).unbind(2)
        q, k = self._rotate(q), self._rotate(k)
        shape = (batch * patches // length, length, attention.num_heads, -1)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
        result: Tensor = attention.proj(out.transpose(1, 2).reshape(batch, patches, hidden))
        return result

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        result: Tensor = x * self.cos + turned * self.sin
        return result
