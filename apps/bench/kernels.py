"""`kvshare bench kernels`: the attention and edit kernels beside what else could do the work.

Every method is checked against scaled dot products with a dense mask before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from kvshare_mm.apps.bench.rig import machine
from kvshare_mm.kernels import dispatch
from kvshare_mm.kernels.backend import BackendError, resolve
from kvshare_mm.kernels.edits import KVEdit, rotation_table
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.kernels.tiles import attention_tiles

Call = Callable[[], torch.Tensor]
_FLASH_PAGE = 256  # flash-attention's smallest page


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer of a model, a prompt, and the positions to compute in it.

    Attributes:
        model: whose layer it is.
        num_heads, num_kv_heads, head_dim: of the layer.
        num_tokens: length of the prompt.
        num_computed: positions to compute, spread evenly in runs; the last position is one.
        run: length of a run.
    """

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    num_computed: int
    run: int


_SMOLLM2 = ("SmolLM2-135M", 9, 3, 64)
_LLAMA = ("Llama-3-8B", 32, 8, 128)
CPU_SHAPES = tuple(
    Shape(*_SMOLLM2, num_tokens, n, run)
    for num_tokens in (1024, 4096)
    for n, run in ((40, 1), (40, 4), (40, 10), (200, 20), (600, 60))
)
GPU_SHAPES = tuple(
    Shape(*_LLAMA, num_tokens, n, run)
    for num_tokens in (4096, 32768)
    for n, run in ((1, 1), (64, 1), (64, 16), (512, 16), (2048, 64), (4096, 4096))
)


class Problem:
    """Random tensors of a shape: K/V in slot 1 of two, queries at the positions to compute."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self.runs = _runs(shape)
        self.index = torch.cat([torch.arange(a, b) for a, b in self.runs]).to(device)
        generator = torch.Generator(device).manual_seed(0)
        random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        # A slot is a little longer than the prompt, as in the engine.
        length = -(-shape.num_tokens // _FLASH_PAGE) * _FLASH_PAGE + _FLASH_PAGE
        self.key = random(2, shape.num_kv_heads, length, shape.head_dim)
        self.value = random(2, shape.num_kv_heads, length, shape.head_dim)
        self.all_queries = random(shape.num_tokens, shape.num_heads, shape.head_dim)
        self.query = self.all_queries[self.index]
        self.scale = shape.head_dim**-0.5
        slot = torch.ones(1, 1, dtype=torch.int32, device=device)
        self.batch = RaggedQueries([self.index], slot, [shape.num_tokens])

    @property
    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the prompt, ``[1, num_kv_heads, num_tokens, head_dim]``."""
        n = self.shape.num_tokens
        return self.key[1:, :, :n], self.value[1:, :, :n]

    @cached_property
    def mask(self) -> torch.Tensor:
        hidden = torch.arange(self.shape.num_tokens, device=self.index.device) > self.index[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.key.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, over the keys that are seen."""
        pairs = int((self.index + 1).sum())
        return 4 * pairs * self.shape.num_heads * self.shape.head_dim

    @property
    def num_bytes(self) -> int:
        """What must be moved at the least: K and V and the queries once, and the output."""
        s = self.shape
        kv = 2 * s.num_tokens * s.num_kv_heads * s.head_dim
        return self.key.itemsize * (kv + 2 * len(self.index) * s.num_heads * s.head_dim)


def run(
    device: torch.device, *, dtype: torch.dtype, repeats: int, shapes: tuple[Shape, ...]
) -> dict[str, Any]:
    """Measure attention for every shape, and the KV edit once for every model.

    Returns:
        ``machine``, ``device``, ``dtype``, ``attention``: a row for each shape and method, and
        ``edit``: a row for each model and backend. Times are milliseconds a layer.
    """
    attention, edits = [], []
    with torch.inference_mode():
        for shape in shapes:
            attention += _measure_attention(Problem(shape, device, dtype), repeats)
        for shape in {s.model: s for s in shapes}.values():
            edits += _measure_edit(shape, device, dtype, repeats)
    return {
        "machine": machine(),
        "device": dispatch.target_of(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "edit": edits,
    }


def methods(problem: Problem) -> Iterator[tuple[str, Call]]:
    """Everything that can compute the chosen positions here, ``[num_computed, heads, dim]``."""
    yield "sdpa, dense mask", partial(_dense, problem)
    yield "kvshare torch", partial(_dispatched, problem, "torch")
    device = problem.key.device
    try:
        resolve("triton", device)
    except BackendError:
        return
    yield "kvshare triton", partial(_dispatched, problem, "triton")
    if device.type != "cuda":
        return
    yield from _triton_tiles(problem)
    yield "flex attention", _flex(problem)
    if importlib.util.find_spec("flash_attn"):
        yield "flash-attention varlen", _flash(problem)


def _measure_attention(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    shape, device = problem.shape, problem.key.device
    full = _milliseconds(partial(_full, problem), device, repeats)
    expected = _dense(problem).float()
    rows = [{**asdict(shape), "method": "full attention, all positions", "ms": full, "speedup": 1}]
    for name, call in methods(problem):
        error = float((call().float() - expected).abs().max())
        ms = _milliseconds(call, device, repeats)
        rows.append(
            {
                **asdict(shape),
                "method": name,
                "ms": ms,
                "speedup": full / ms,
                "max_abs_error": error,
                "tflops": problem.flops / ms / 1e9,
                "gb_per_s": problem.num_bytes / ms / 1e6,
            }
        )
    return rows


def _measure_edit(
    shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int, layers: int = 4
) -> list[dict[str, Any]]:
    """Move nearly all of a prompt by one position, in runs of 60; beside it, a plain copy."""
    n = shape.num_tokens
    size = (layers, 1, shape.num_kv_heads, n + 1, shape.head_dim)
    source, target = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    token = torch.arange(n, device=device)
    token = token[token % 64 < 60]
    inv_freq = 1e4 ** -(torch.arange(shape.head_dim // 2, device=device) / shape.head_dim * 2)
    run = (token // 64).int()
    cos, sin = rotation_table(torch.ones(n // 64 + 1), inv_freq)
    edit = KVEdit(token, token + 1, run, cos, sin)
    moved = 4 * len(token) * layers * shape.num_kv_heads * shape.head_dim * source.itemsize
    calls: dict[str, Callable[[], object]] = {"copy": lambda: (source.clone(), source.clone())}
    for backend in ("torch", "triton"):
        try:
            resolve(backend, device)
        except BackendError:
            continue
        calls[f"kvshare {backend}"] = partial(
            dispatch.edit_kv, source, source, target, target.clone(), edit, backend
        )
    rows = []
    for name, call in calls.items():
        ms = _milliseconds(call, device, repeats) / layers
        share = 1 if name != "copy" else (n + 1) / len(token)
        rows.append(
            {
                "model": shape.model,
                "num_tokens": n,
                "method": name,
                "ms": ms,
                "gb_per_s": share * moved / layers / ms / 1e6,
            }
        )
    return rows


def _runs(shape: Shape) -> list[tuple[int, int]]:
    """Runs ``[start, end)`` spread evenly over the prompt, the last one at its end."""
    count = max(1, shape.num_computed // shape.run)
    step = (shape.num_tokens - shape.run) / max(1, count - 1)
    starts = [round(i * step) for i in range(count)] if count > 1 else [round(step)]
    return [(start, start + shape.run) for start in starts]


def _milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after two that do not count."""
    call()
    call()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _full(problem: Problem) -> torch.Tensor:
    query = problem.all_queries.transpose(0, 1)[None]
    return F.scaled_dot_product_attention(query, *problem.seen, is_causal=True, enable_gqa=True)


def _dense(problem: Problem) -> torch.Tensor:
    query = problem.query.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(
        query, *problem.seen, attn_mask=problem.mask, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _dispatched(problem: Problem, backend: str) -> torch.Tensor:
    return dispatch.partial_attention(
        problem.query, problem.key, problem.value, problem.batch, problem.scale, backend
    )


def _triton_tiles(problem: Problem) -> Iterator[tuple[str, Call]]:
    """Every tile that the chip can run: what `tiles.best_tile` chooses among."""
    from kvshare_mm.kernels.partial_attention import partial_attention_triton

    p = problem
    _, splits = dispatch.choose(p.query, p.key, p.value, p.batch)
    dim = p.shape.head_dim
    for tile in attention_tiles(dispatch.target_of(p.key.device), dim, dim, p.key.dtype):

        def call(tile: Any = tile) -> torch.Tensor:
            return partial_attention_triton(p.query, p.key, p.value, p.batch, p.scale, tile, splits)

        yield f"kvshare triton, tile {tile.block_m}x{tile.block_n}, {splits} splits", call


def _flex(problem: Problem) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    index, shape = problem.index, problem.shape

    def sees(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return kv <= index[q]

    blocks = create_block_mask(
        sees, None, None, len(index), shape.num_tokens, device=str(index.device)
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    query = problem.query.transpose(0, 1)[None]

    def call() -> torch.Tensor:
        out: torch.Tensor = compiled(query, *problem.seen, block_mask=blocks, enable_gqa=True)
        return out[0].transpose(0, 1)

    return call


def _flash(problem: Problem) -> Call:
    """Each run is a row of its own over the same pages, as long as its end: exact."""
    varlen = importlib.import_module("flash_attn").flash_attn_varlen_func
    device = problem.key.device
    pages = [
        x[1].unflatten(1, (-1, _FLASH_PAGE)).permute(1, 2, 0, 3).contiguous()
        for x in (problem.key, problem.value)
    ]
    lengths, ends = [b - a for a, b in problem.runs], [b for _, b in problem.runs]
    table = torch.arange(len(pages[0]), dtype=torch.int32, device=device)
    options = {
        "cu_seqlens_q": _cumulated(lengths, device),
        "cu_seqlens_k": _cumulated(ends, device),
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(ends),
        "causal": True,
        "block_table": table.expand(len(ends), -1).contiguous(),
    }

    def call() -> torch.Tensor:
        out: torch.Tensor = varlen(problem.query, *pages, **options)
        return out

    return call


def _cumulated(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
