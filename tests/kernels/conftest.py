"""Random K/V in pages, and queries at random token indices.

Kernels run in Triton's interpreter on the CPU (`tests/conftest.py` turns it on), or on a GPU:
``TRITON_INTERPRET=0 pytest tests/kernels``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from kvshare_mm.kernels.ragged import RaggedQueries

pytest.importorskip("triton")

from kvshare_mm.kernels.backend import interpreting

DEVICE = torch.device("cpu" if interpreting() else "cuda")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Case:
    """One ragged batch.

    Attributes:
        indices: each request's token indices.
        query: ``[queries, heads, dim]``.
        key, value: ``[pages, kv_heads, page_size, dim]``, NaN wherever no query may look.
        table: ``[requests, pages]``.
        scale: on the scores.
        sees: for each request the last keys that its queries see; None: their own.
    """

    indices: list[torch.Tensor]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor
    scale: float
    sees: list[torch.Tensor] | None = None

    @property
    def batch(self) -> RaggedQueries:
        return RaggedQueries(self.indices, self.table, sees=self.sees)

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows of the batch, request by request."""
        return list(rows.split([len(i) for i in self.indices]))


def make_case(
    indices: list[list[int]],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 32,
    value_dim: int | None = None,
    page_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pictures: Sequence[tuple[int, int]] = (),
) -> Case:
    """A case over requests' token indices; `page_size` None means contiguous K/V in slots.

    Two pages belong to no request. NaN stands in them, behind every request's last query, and in
    the pages that a request's table lists but does not reach. The positions of a picture, those
    ``[start, end)`` of `pictures` in every request, see each other.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1).to(dtype).to(DEVICE)

    value_dim = value_dim or dim
    ends = {at: end - 1 for start, end in pictures for at in range(start, end)}
    sees = [[ends.get(at, at) for at in index] for index in indices]
    lengths = [last[-1] + 1 if last else 0 for last in sees]
    size = page_size or max(lengths) + 3
    columns = 1 if page_size is None else max(-(-max(lengths) // size), 2)
    num_pages = len(indices) * columns + 2
    table = torch.randperm(num_pages, generator=generator)[: len(indices) * columns]
    table = table.view(len(indices), columns)
    key, value = (
        torch.full((num_pages, kv_heads, size, d), float("nan"), dtype=dtype, device=DEVICE)
        for d in (dim, value_dim)
    )
    for request, n in enumerate(lengths):
        for token in range(n):
            page = table[request, token // size]
            key[page, :, token % size] = uniform(kv_heads, dim)
            value[page, :, token % size] = uniform(kv_heads, value_dim)
    query = uniform(sum(map(len, indices)), kv_heads * group, dim)
    return Case(
        [torch.tensor(i, dtype=torch.int64) for i in indices],
        # Attention that looks at few keys: an even one would hide a wrong mask.
        query * 4,
        key,
        value,
        table.to(DEVICE),
        dim**-0.5,
        [torch.tensor(last, dtype=torch.int64) for last in sees] if pictures else None,
    )
