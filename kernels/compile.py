"""Compile the kernels for a GPU that need not be there, and read what the compiler says of them.

What is compiled is what would run: the constants come from the functions that launch the kernels,
the tiles from `tiles.py`.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvshare_mm.kernels.backend import BackendError, interpreting, require_triton
from kvshare_mm.kernels.scoring import PLAIN, Scoring
from kvshare_mm.kernels.tiles import SHARED_BYTES, Tile, attention_tiles, serving_tiles

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_TABLES = frozenset(
    ("index_ptr", "last_key_ptr", "cu_seqlens_q", "block_table", "run_ptr", "rotation_ptr")
)
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# gpt-oss (sinks in every layer), Gemma 3 (a window; pictures), Gemma 2 (capped), Llama 4 (chunks).
_SCORINGS = (
    (64, Scoring(window=128, sinks=torch.zeros(1)), False),
    (256, Scoring(window=512), False),
    (128, Scoring(window=1024), True),
    (256, Scoring(window=1024), True),
    (256, Scoring(window=4096, softcap=50.0), False),
    (128, Scoring(chunk=8192), False),
)
_GROUP = 4  # query heads per KV head, as in Llama 3 8B and Mistral 7B


@dataclass(frozen=True, slots=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: kernel and what it was compiled for.
        target: chip, e.g. "sm_90".
        registers: 32-bit registers per thread.
        spills: bytes that a thread keeps in memory because registers ran out.
        shared_bytes: shared memory of one program.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared_bytes: int

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and the chip has the shared memory."""
        return self.spills == 0 and self.shared_bytes <= SHARED_BYTES[self.target]


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel, and what it is specialised for.

    Attributes:
        name: for people.
        kernel: the ``@triton.jit`` function.
        constants: values of its ``constexpr`` arguments.
        types: of the arguments whose type is not found from their name.
        options: num_warps and the like.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    options: dict[str, int]


def compile_kernels(target: str, all_tiles: bool = False) -> Iterator[Compiled]:
    """Compile everything that would run on a chip, one after the other.

    Args:
        target: one of `TARGETS`.
        all_tiles: also the tiles that fit and are not chosen.

    Raises:
        BackendError: an unknown target, no Triton, or Triton's interpreter is on.
    """
    require_triton()
    if target not in TARGETS:
        raise BackendError(f"target {target!r} is none of {', '.join(TARGETS)}")
    if interpreting():
        raise BackendError(
            "TRITON_INTERPRET=1 turns the compiler off for the whole process: unset it"
        )
    for variant in variants(target, all_tiles):
        yield compile_variant(variant, target)


def variants(target: str, all_tiles: bool = False) -> Iterator[Variant]:
    """Common head dimensions, contiguous and paged, every tile."""
    tiles = attention_tiles if all_tiles else serving_tiles
    for dtype, dim, page_sizes in (
        (torch.bfloat16, 64, (0, 16)),
        (torch.bfloat16, 128, (0, 16)),
        (torch.bfloat16, 256, (16,)),
        (torch.float32, 128, (16,)),
    ):
        for tile in tiles(target, dim, dim, dtype):
            for page_size in page_sizes:
                yield _attention(tile, dtype, dim, page_size, 1)
    small = serving_tiles(target, 128, 128, torch.float16)[-1]
    yield _attention(small, torch.float16, 128, 16, 8)
    yield _combine(8, 128)
    for dim, scoring, ahead in _SCORINGS:
        for tile in tiles(target, dim, dim, torch.bfloat16):
            yield _attention(tile, torch.bfloat16, dim, 16, 1, scoring, ahead)
    for dim, pairs, interleaved in ((64, 32, False), (128, 64, False), (256, 32, True)):
        yield _edit(torch.bfloat16, dim, pairs, interleaved)
    yield _edit(torch.bfloat16, 256, 128, False, by_layer=True)


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile one kernel; nothing is read from or written to Triton's cache."""
    import triton
    from triton import knobs
    from triton.compiler import ASTSource

    kernel, constants = variant.kernel, variant.constants
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = variant.types.get(name) or _type_of(name)
        # What Triton finds at launch: allocations and head dimensions are multiples of 16.
        if signature[name].startswith("*") or name.startswith("stride_"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    with (
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        options = dict(variant.options)
        if target.startswith("gfx"):
            options.pop("maxnreg", None)
        compiled = triton.compile(source, target=_gpu(target), options=options)
    registers, spills = _usage(target, log.getvalue(), compiled.asm.get("amdgcn", ""))
    return Compiled(variant.name, target, registers, spills, int(compiled.metadata.shared))


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _usage(target: str, ptxas_log: str, amdgcn: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread, from what the assembler printed."""
    if target.startswith("gfx"):
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", amdgcn)
        # Scratch memory: scalars that run out of registers go to lanes of vector registers.
        spills = [int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", amdgcn)]
    else:
        registers = re.findall(r"Used (\d+) registers", ptxas_log)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", ptxas_log)]
    if not registers or not spills:
        raise RuntimeError(f"the assembler for {target} did not say what the kernel uses")
    return int(registers[-1]), sum(spills)


def _type_of(name: str) -> str:
    """Arguments of all kernels: table and index pointers, factors, sizes and strides."""
    if name in _TABLES:
        return "*i32"
    if name in ("source_slots", "target_slots"):
        return "*i64"
    if name.startswith(("scale", "softcap")):
        return "fp32"
    return "*fp32" if name.endswith("_ptr") else "i32"


def _described(kernel: str, dtype: torch.dtype | None, *details: str) -> str:
    kind = () if dtype is None else (str(dtype).removeprefix("torch."),)
    return f"{kernel} ({', '.join((*kind, *details))})"


def _pages(page_size: int) -> str:
    return f"pages of {page_size}" if page_size else "contiguous"


def _attention(
    tile: Tile,
    dtype: torch.dtype,
    dim: int,
    page_size: int,
    num_splits: int,
    scoring: Scoring = PLAIN,
    ahead: bool = False,
) -> Variant:
    from kvshare_mm.kernels.partial_attention import attention_constants, partial_attention_kernel

    kv = "*" + _TYPES[dtype]
    shape = f"tile {tile.block_m}x{tile.block_n}"
    details = [f"dim {dim}", _pages(page_size), shape]
    if num_splits > 1:
        details.append(f"{num_splits} splits")
    details += [
        words
        for words, given in (
            (f"window {scoring.window}", scoring.window),
            (f"chunks of {scoring.chunk}", scoring.chunk),
            ("capped", scoring.softcap),
            ("sinks", scoring.sinks),
            ("pictures", ahead or None),
        )
        if given is not None
    ]
    constants = attention_constants(
        tile,
        dtype,
        group=_GROUP,
        page_size=page_size,
        dim_k=dim,
        dim_v=dim,
        num_splits=num_splits,
        scoring=scoring,
        ahead=ahead,
    )
    out = kv if num_splits == 1 else "*fp32"
    types = {"q_ptr": kv, "k_ptr": kv, "v_ptr": kv, "out_ptr": out, "sinks_ptr": kv}
    name = _described("partial_attention", dtype, *details)
    return Variant(
        name, partial_attention_kernel, constants, types, tile.launch_options(nvidia=True)
    )


def _combine(num_splits: int, dim: int) -> Variant:
    from kvshare_mm.kernels.partial_attention import combine_constants, combine_kernel

    name = _described("combine", None, f"{num_splits} splits", f"dim {dim}")
    constants = combine_constants(num_splits, dim)
    return Variant(name, combine_kernel, constants, {"out_ptr": "*bf16"}, {"num_warps": 1})


def _edit(
    dtype: torch.dtype, dim: int, pairs: int, interleaved: bool, by_layer: bool = False
) -> Variant:
    from kvshare_mm.kernels.edit_kv import NUM_WARPS, edit_constants, edit_kv_kernel

    kv = "*" + _TYPES[dtype]
    layout = "interleaved" if interleaved else "half-split"
    details = [f"dim {dim}", f"{2 * pairs} rotary {layout}"]
    name = _described("edit_kv", dtype, *details, *["by layer"] * by_layer)
    return Variant(
        name,
        edit_kv_kernel,
        edit_constants(dim, dim, pairs, interleaved, by_layer),
        {"from_k": kv, "from_v": kv, "to_k": kv, "to_v": kv},
        {"num_warps": NUM_WARPS},
    )
