"""Tile shapes of the attention kernels, and which of them a chip can run.

No Triton here: what fits is arithmetic on shared memory and registers, checked against the
compiler by `kvshare kernels compile` and its test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Bytes of shared memory that one program may use: NVIDIA CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability"; AMD CDNA3 ISA guide (64 KiB of LDS).
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
_SMALLEST = 64 << 10  # any other chip


@dataclass(frozen=True, slots=True)
class Tile:
    """How much one program holds: rows (query x head of a group), keys, and who works on it.

    Attributes:
        block_m: rows of a query tile.
        block_n: keys of a key tile.
        num_warps: of 32 threads (64 on AMD).
        num_stages: key tiles in flight between memory and the tensor cores.
        max_registers: a thread may have so many. Where it is not said, ptxas now and then spills a
            few bytes to reach the next step of occupancy.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def launch_options(self, nvidia: bool) -> dict[str, int]:
        """The keywords that a launch or a compilation takes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers and nvidia:
            options["maxnreg"] = self.max_registers
        return options

    def shared_bytes(self, dim_k: int, dim_v: int, itemsize: int) -> int:
        """An upper bound: the query tile, the weights, and K and V tiles once a stage."""
        k, v = block_dim(dim_k), block_dim(dim_v)
        weights = self.block_m * self.block_n
        return itemsize * (self.block_m * k + weights + self.num_stages * self.block_n * (k + v))

    def registers(self, dim_k: int, dim_v: int, itemsize: int, warp_size: int = 32) -> int:
        """A rough count per thread, that tells tiles that spill from tiles that do not.

        Tensor cores: accumulator, scores, weights, and the query tile. float32 is multiplied
        without them, and the compiler unrolls the whole product.
        """
        k, v = block_dim(dim_k), block_dim(dim_v)
        threads = self.num_warps * warp_size
        if itemsize == 4:
            return self.block_m * self.block_n * max(k, v) // threads
        return self.block_m * (v + 2 * self.block_n + k // 2) // threads


# In order of preference, by bytes per element. Large tiles read K and V less often; small ones fit
# large heads, and few rows.
_TILES = {
    2: (
        Tile(128, 64, 8, 3),
        Tile(128, 32, 8, 3),
        Tile(64, 64, 8, 2, 255),
        Tile(64, 32, 8, 2, 255),
        Tile(32, 64, 8, 2, 255),
        Tile(16, 64, 4, 2, 255),
        Tile(16, 32, 4, 2, 255),
        Tile(16, 16, 4, 1, 255),
    ),
    4: (
        Tile(32, 32, 8, 2),
        Tile(16, 32, 4, 2),
        Tile(16, 16, 4, 2, 255),
        Tile(16, 16, 8, 1),
    ),
}


def _most_registers(target: str, itemsize: int) -> int:
    """What `Tile.registers` may say of a tile that does not spill; found by compiling."""
    if itemsize == 4:
        return 256
    # Before Hopper, the tensor cores take all operands from registers.
    return 140 if target.startswith("sm_8") else 200


def block_dim(dim: int) -> int:
    """Head dimension as tiles hold it: a power of two, and what the tensor cores take."""
    return max(16, 1 << (dim - 1).bit_length())


def attention_tiles(target: str, dim_k: int, dim_v: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles that fit a chip, in order of preference.

    Args:
        target: "sm_90", "gfx942", ...; an unknown one is taken to have little shared memory.
        dim_k: head dimension of queries and keys, at most 256.
        dim_v: head dimension of values, at most 256.
        dtype: of queries, keys and values.
    """
    limit = SHARED_BYTES.get(target, _SMALLEST)
    registers = _most_registers(target, dtype.itemsize)
    warp_size = 64 if target.startswith("gfx") else 32
    return tuple(
        tile
        for tile in _TILES[dtype.itemsize]
        if tile.shared_bytes(dim_k, dim_v, dtype.itemsize) <= limit
        and tile.registers(dim_k, dim_v, dtype.itemsize, warp_size) <= registers
    )


def serving_tiles(target: str, dim_k: int, dim_v: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Of each height the first tile that fits: these run; the others are there to be measured."""
    by_height: dict[int, Tile] = {}
    for tile in attention_tiles(target, dim_k, dim_v, dtype):
        by_height.setdefault(tile.block_m, tile)
    return tuple(by_height.values())


def best_tile(target: str, dim_k: int, dim_v: int, dtype: torch.dtype, num_rows: int) -> Tile:
    """The highest tile that fits and is not higher than the longest request's rows need.

    Args:
        num_rows: of the longest request: queries times the heads that share a KV head.
    """
    tiles = serving_tiles(target, dim_k, dim_v, dtype)
    need = 1 << max(0, num_rows - 1).bit_length()
    return next((t for t in tiles if t.block_m <= need), tiles[-1])
