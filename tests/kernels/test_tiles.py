"""Which tiles a chip can run, and over how many programs keys are split."""

from __future__ import annotations

import pytest
import torch

from kvshare_mm.kernels.dispatch import num_splits
from kvshare_mm.kernels.tiles import (
    SHARED_BYTES,
    attention_tiles,
    best_tile,
    block_dim,
    serving_tiles,
)

_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def test_block_dim() -> None:
    assert [block_dim(d) for d in (1, 16, 17, 64, 80, 96, 128, 129, 256)] == [
        16, 16, 32, 64, 128, 128, 128, 256, 256
    ]  # fmt: skip


@pytest.mark.parametrize("target", [*SHARED_BYTES, "cpu", "sm_75"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_every_chip_has_a_tile_for_every_head(target: str, dtype: torch.dtype, dim: int) -> None:
    tiles = attention_tiles(target, dim, dim, dtype)
    limit = SHARED_BYTES.get(target, 64 << 10)
    assert tiles
    assert all(t.shared_bytes(dim, dim, dtype.itemsize) <= limit for t in tiles)
    serving = serving_tiles(target, dim, dim, dtype)
    assert set(serving) <= set(tiles)
    assert len({t.block_m for t in serving}) == len(serving)


def test_large_heads_get_smaller_tiles() -> None:
    heights = [
        max(t.block_m for t in attention_tiles("sm_90", dim, dim, torch.bfloat16))
        for dim in (64, 128, 256)
    ]
    assert heights == [128, 128, 64]
    little = attention_tiles("gfx942", 128, 128, torch.bfloat16)
    assert set(little) < set(attention_tiles("sm_90", 128, 128, torch.bfloat16))


@pytest.mark.parametrize(
    ("num_rows", "height"), [(0, 16), (1, 16), (16, 16), (17, 32), (40, 64), (65, 128), (9999, 128)]
)
def test_few_rows_get_a_low_tile(num_rows: int, height: int) -> None:
    assert best_tile("sm_90", 128, 128, torch.bfloat16, num_rows).block_m == height


@pytest.mark.parametrize(
    ("tiles", "kv_heads", "max_kv_len", "processors", "expected"),
    [
        (1, 8, 16384, 132, 16),  # few queries over much: spread
        (1, 8, 300, 132, 1),  # too few keys to be worth it
        (1, 8, 1024, 132, 4),
        (64, 8, 16384, 132, 1),  # the GPU is full
        (1, 1, 1 << 20, 132, 16),
        (0, 8, 0, 132, 1),
    ],
)
def test_splits_fill_the_gpu(
    tiles: int, kv_heads: int, max_kv_len: int, processors: int, expected: int
) -> None:
    assert num_splits(tiles, kv_heads, max_kv_len, processors) == expected
