"""The operations of KV reuse, each on the implementation that fits the device.

| backend | runs |
|---|---|
| ``triton`` | the Triton kernels: on a GPU, or on the CPU in Triton's interpreter (tests) |
| ``torch`` | `sdpa.py` |
| ``auto`` | Triton on a GPU, torch on a CPU |

K/V come in *pages*, ``[num_pages, num_kv_heads, page_size, dim]`` with any strides but a dense
last dimension: vLLM's ``[num_pages, page_size, num_kv_heads, dim]`` is a ``transpose(1, 2)`` away,
and slots of contiguous K/V are pages of a slot's length.

Triton is imported when it is first needed.
"""

from __future__ import annotations

import torch

from kvshare_mm.kernels.backend import interpreting, resolve
from kvshare_mm.kernels.edits import KVEdit
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.kernels.scoring import PLAIN, Scoring
from kvshare_mm.kernels.sdpa import edit_kv_torch, partial_attention_torch
from kvshare_mm.kernels.tiles import Tile, best_tile

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_SPLITS = 16
_MIN_KEYS_PER_SPLIT = 256  # below, joining the parts costs more than it gains


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: RaggedQueries,
    scale: float,
    backend: str = "auto",
    scoring: Scoring = PLAIN,
) -> torch.Tensor:
    """Attention of queries at arbitrary token indices over all earlier keys of their request.

    >>> k = v = torch.randn(1, 3, 1024, 64)  # one slot of 1,024 tokens, 3 KV heads
    >>> index = torch.tensor([7, 8, 500, 1023])
    >>> batch = RaggedQueries([index], block_table=torch.tensor([[0]]))
    >>> partial_attention(torch.randn(4, 9, 64), k, v, batch, scale=64**-0.5).shape
    torch.Size([4, 9, 64])

    Args:
        query: ``[num_queries, num_heads, head_dim]``, head h reads KV head
            ``h // (num_heads // num_kv_heads)``. Triton takes float16, bfloat16 and float32, and
            head dims up to 256.
        key: ``[num_pages, num_kv_heads, page_size, head_dim]``, dtype of `query`.
        value: ``[num_pages, num_kv_heads, page_size, value_dim]``, dtype of `query`.
        batch: the queries' token indices and their requests' pages.
        scale: factor on the scores.
        backend: "auto", "triton" or "torch".
        scoring: windows, sinks and capped scores of the layer.

    Returns:
        ``[num_queries, num_heads, value_dim]`` in the dtype of `query`; sums are float32.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
        BackendError: the backend cannot run here.
    """
    _check_attention(query, key, value, batch, scoring)
    if resolve(backend, query.device) == "torch":
        return partial_attention_torch(query, key, value, batch, scale, scoring)
    if max(query.shape[2], value.shape[3]) > MAX_HEAD_DIM:
        raise ValueError(f"the Triton kernels take no head dims above {MAX_HEAD_DIM}")
    if query.dtype not in _DTYPES:
        raise ValueError("the Triton kernels take float16, bfloat16 and float32")
    from kvshare_mm.kernels.partial_attention import partial_attention_triton

    tile, splits = choose(query, key, value, batch, scoring)
    return partial_attention_triton(query, key, value, batch, scale, tile, splits, scoring)


def edit_kv(
    source_key: torch.Tensor,
    source_value: torch.Tensor,
    target_key: torch.Tensor,
    target_value: torch.Tensor,
    edit: KVEdit,
    backend: str = "auto",
) -> None:
    """Move kept tokens' K and V into a target, keys re-rotated, all layers at once.

    Args:
        source_key, source_value: ``[num_layers, num_pages, num_kv_heads, page_size, dim]``, read.
            One donor's K/V, or a pool that many donors' pages lie in.
        target_key, target_value: the same with other pages, written; their dtype may differ.
        edit: which slots go where, and the rotation of each run.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes or strides do not fit.
        BackendError: the backend cannot run here.
    """
    for name, source, target in (
        ("key", source_key, target_key),
        ("value", source_value, target_value),
    ):
        if source.ndim != 5 or target.ndim != 5:
            raise ValueError(f"{name}s are [layers, pages, heads, page_size, dim]")
        if [source.shape[i] for i in (0, 2, 4)] != [target.shape[i] for i in (0, 2, 4)]:
            raise ValueError(
                f"source and target {name}s differ in layers, heads or dim: "
                f"{list(source.shape)}, {list(target.shape)}"
            )
        if source.stride(4) != 1 or target.stride(4) != 1:
            raise ValueError(f"the last dimension of {name}s must be dense")
    if source_key.shape[:4] != source_value.shape[:4]:
        raise ValueError("keys and values differ in layers, pages, heads or page size")
    if target_key.shape[:4] != target_value.shape[:4]:
        raise ValueError("keys and values differ in layers, pages, heads or page size")
    if edit.rotation is not None and len(edit.rotation) != len(source_key):
        raise ValueError(f"{len(edit.rotation)} layers' rotations, and {len(source_key)} layers")
    if edit.rotary_dim > source_key.shape[4]:
        raise ValueError(f"{edit.rotary_dim} rotary dims, and keys of {source_key.shape[4]}")
    if resolve(backend, target_key.device) == "torch":
        edit_kv_torch(source_key, source_value, target_key, target_value, edit)
        return
    from kvshare_mm.kernels.edit_kv import edit_kv_triton

    edit_kv_triton(source_key, source_value, target_key, target_value, edit)


def target_of(device: torch.device) -> str:
    """Name of the chip as `tiles` knows it, e.g. "sm_90"; "cpu" in the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def num_splits(num_tiles: int, num_kv_heads: int, max_kv_len: int, num_processors: int) -> int:
    """Over how many programs the keys of a query tile are spread: enough to fill the GPU."""
    programs = max(1, num_tiles * num_kv_heads)
    wanted = min(num_processors // programs, max_kv_len // _MIN_KEYS_PER_SPLIT, _MAX_SPLITS)
    # A power of two: each number of splits is a kernel of its own to compile.
    return 1 << max(0, wanted.bit_length() - 1)


def choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: RaggedQueries,
    scoring: Scoring = PLAIN,
) -> tuple[Tile, int]:
    """Tile and number of splits that `partial_attention` runs with on Triton."""
    group = query.shape[1] // key.shape[1]
    rows = max(batch.lengths, default=0) * group
    tile = best_tile(target_of(query.device), query.shape[2], value.shape[3], query.dtype, rows)
    if query.device.type != "cuda" or interpreting():
        return tile, 1
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    num_tiles = sum(-(-n * group // tile.block_m) for n in batch.lengths)
    seen = min(batch.max_kv_len, *(n or batch.max_kv_len for n in scoring.span))
    return tile, num_splits(num_tiles, key.shape[1], seen, processors)


def _check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: RaggedQueries,
    scoring: Scoring,
) -> None:
    if query.ndim != 3 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(
            "query is [queries, heads, dim]; key and value are [pages, kv_heads, page_size, dim]"
        )
    if len(query) != batch.num_queries:
        raise ValueError(f"{len(query)} queries, and the batch has {batch.num_queries}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError("key and value differ in pages, heads or page size")
    if query.shape[2] != key.shape[3]:
        raise ValueError(f"query dim {query.shape[2]} and key dim {key.shape[3]} differ")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} heads do not share {key.shape[1]} KV heads evenly")
    if {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError("query, key and value differ in dtype")
    if query.stride(2) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        raise ValueError("the last dimension of query, key and value must be dense")
    if scoring.sinks is not None and scoring.sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks are [{query.shape[1]} heads], not {list(scoring.sinks.shape)}")
