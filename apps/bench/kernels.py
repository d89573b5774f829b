"""`kvshare bench kernels`: one layer's attention and KV edit, by every backend there is here.

Attention is checked against scaled dot products with a dense mask before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from kvshare_mm.kernels import dispatch
from kvshare_mm.kernels.backend import BackendError, resolve
from kvshare_mm.kernels.edits import KVEdit, rotation_table
from kvshare_mm.kernels.ragged import RaggedQueries

# Moved by one position in runs of 60, which leaves gaps of 4.
_EDIT_RUN, _EDIT_STEP = 60, 64


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

    @property
    def index(self) -> torch.Tensor:
        """The positions to compute, in runs from the beginning to the end."""
        count = max(1, self.num_computed // self.run)
        starts = torch.linspace(0, self.num_tokens - self.run, count).round().long()
        if count == 1:
            starts += self.num_tokens - self.run
        return (starts[:, None] + torch.arange(self.run)).flatten()


SHAPES = {
    "cpu": tuple(
        Shape("SmolLM2-135M", 9, 3, 64, num_tokens, n, run)
        for num_tokens in (1024, 4096)
        for n, run in ((40, 1), (40, 4), (40, 10), (200, 20), (600, 60))
    ),
    "cuda": tuple(
        Shape("Llama-3-8B", 32, 8, 128, num_tokens, n, run)
        for num_tokens in (4096, 32768)
        for n, run in ((1, 1), (64, 1), (64, 16), (512, 16), (2048, 64), (4096, 4096))
    ),
}


def run(device: torch.device, *, repeats: int, shapes: tuple[Shape, ...]) -> dict[str, Any]:
    """Measure attention for every shape, the KV edit for every length; milliseconds a layer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        return {
            "kind": "kernels",
            "device": dispatch.target_of(device),
            "dtype": str(dtype).removeprefix("torch."),
            "attention": [r for s in shapes for r in _attention(s, device, dtype, repeats)],
            "edit": [
                r
                for s in {s.num_tokens: s for s in shapes}.values()
                for r in _edit(s, device, dtype, repeats)
            ],
        }


def _backends(device: torch.device) -> Iterator[str]:
    for backend in ("torch", "triton"):
        try:
            resolve(backend, device)
        except BackendError:
            continue
        yield backend


def _attention(
    shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    random = partial(torch.randn, device=device, dtype=dtype)
    n, index = shape.num_tokens, shape.index.to(device)
    key, value = (random(1, shape.num_kv_heads, n, shape.head_dim) for _ in range(2))
    queries = random(n, shape.num_heads, shape.head_dim)
    query = queries[index]
    slot = torch.zeros(1, 1, dtype=torch.int32, device=device)
    batch = RaggedQueries([index], slot, [n])
    mask = torch.arange(n, device=device) <= index[:, None]
    sdpa = partial(F.scaled_dot_product_attention, key=key, value=value, enable_gqa=True)

    def dense() -> torch.Tensor:
        return sdpa(query.transpose(0, 1)[None], attn_mask=mask)[0].transpose(0, 1)

    calls: dict[str, Callable[[], torch.Tensor]] = {"sdpa, dense mask": dense}
    for backend in _backends(device):
        calls[f"kvshare {backend}"] = partial(
            dispatch.partial_attention, query, key, value, batch, shape.head_dim**-0.5, backend
        )
    full = _milliseconds(lambda: sdpa(queries.transpose(0, 1)[None], is_causal=True), repeats)
    whole = {"method": "full attention, all positions", "ms": full, "speedup": 1.0}
    rows: list[dict[str, Any]] = [{**asdict(shape), **whole, "max_abs_error": None}]
    for name, call in calls.items():
        error = float((call().float() - dense().float()).abs().max())
        ms = _milliseconds(call, repeats)
        timed = {"method": name, "ms": ms, "speedup": full / ms, "max_abs_error": error}
        rows.append({**asdict(shape), **timed})
    return rows


def _edit(
    shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int, layers: int = 4
) -> list[dict[str, Any]]:
    """Nearly all of a prompt by one position; beside it, a plain copy."""
    n = shape.num_tokens
    size = (layers, 1, shape.num_kv_heads, n + 1, shape.head_dim)
    source, target = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    token = torch.arange(n, device=device)
    token = token[token % _EDIT_STEP < _EDIT_RUN]
    inv_freq = 1e4 ** -(torch.arange(shape.head_dim // 2, device=device) / shape.head_dim * 2)
    cos, sin = rotation_table(torch.ones(n // _EDIT_STEP + 1), inv_freq[None])
    edit = KVEdit(token, token + 1, (token // _EDIT_STEP).int(), cos, sin)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: (source.clone(), source.clone())}
    for backend in _backends(device):
        calls[f"edit, {backend}"] = partial(
            dispatch.edit_kv, source, source, target, target.clone(), edit, backend
        )
    times = {name: _milliseconds(call, repeats) / layers for name, call in calls.items()}
    moved = {**asdict(shape), "num_computed": len(token), "run": _EDIT_RUN, "max_abs_error": None}
    # K and V, each read and written.
    num_bytes = 4 * shape.num_kv_heads * shape.head_dim * source.itemsize
    tokens = {name: n + 1 if name == "copy" else len(token) for name in times}
    return [
        {
            **moved,
            "method": name,
            "ms": ms,
            "speedup": times["copy"] / ms,
            "gb_per_s": num_bytes * tokens[name] / ms / 1e6,
        }
        for name, ms in times.items()
    ]


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after two that do not count."""

    def finished() -> float:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    times = [finished() for _ in range(repeats + 2)]
    return statistics.median(b - a for a, b in pairwise(times[1:]))
