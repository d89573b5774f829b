"""Queries of several requests in one launch, each at its own token index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from kvshare_mm.kernels.scoring import PLAIN, Scoring

# Most queries that share one call and one mask on the torch path. Measured, see README.md: fewer
# pay for calls, more for keys that only the last of them sees.
CHUNK = 32


class Chunk(NamedTuple):
    """Queries ``[start, end)`` of the batch, all of one request, and the keys
    ``[first_key, kv_len)`` that they may see."""

    request: int
    start: int
    end: int
    first_key: int
    kv_len: int
    causal: bool


class RaggedQueries:
    """Which token each query is, and where the K/V of its request lie.

    K/V lie in *pages* of ``page_size`` tokens. Contiguous K/V are the case of one page per request:
    the page is then the request's slot, and as long as a slot.

    Args:
        indices: for each request ``[n_r]`` its queries' token indices, strictly ascending. A
            request may have none. Query i sees the keys ``0 .. index[i]`` of its request.
        block_table: ``[num_requests, max_pages]`` page of token ``t`` at column
            ``t // page_size``; entries behind a request's last page are never read.
        kv_lens: each request's last index plus one (0 if it has none), if the caller knows: then
            nobody has to wait for the GPU to tell.
        sees: as `indices`, of each query the last key that it sees, where some see keys behind
            their own: not before its own index, nowhere falling, and in `kv_lens` instead of the
            indices. Windows and chunks begin by a query's own index. None: its own is the last.

    Raises:
        ValueError: the shapes do not fit each other.
    """

    def __init__(
        self,
        indices: Sequence[torch.Tensor],
        block_table: torch.Tensor,
        kv_lens: Sequence[int] | None = None,
        sees: Sequence[torch.Tensor] | None = None,
    ) -> None:
        if block_table.ndim != 2 or len(block_table) != len(indices):
            raise ValueError(
                f"block_table is {list(block_table.shape)}, not [{len(indices)} requests, pages]"
            )
        if any(i.ndim != 1 or i.is_floating_point() for i in indices):
            raise ValueError("indices are one-dimensional integer tensors, one per request")
        if sees is not None and [s.shape for s in sees] != [i.shape for i in indices]:
            raise ValueError("sees has one entry for each index")
        device = block_table.device
        self.lengths = tuple(len(i) for i in indices)
        self.index = (
            torch.cat(list(indices)).to(device, torch.int32)
            if indices
            else torch.empty(0, dtype=torch.int32, device=device)
        )
        self.sees = torch.cat(list(sees)).to(device, torch.int32) if sees else None
        self.block_table = block_table.to(torch.int32).contiguous()
        if kv_lens is not None:
            self.kv_lens = tuple(kv_lens)
        self._chunks: dict[tuple[int, int, bool], tuple[Chunk, ...]] = {}
        self._masks: dict[tuple[int, int, bool, torch.dtype], tuple[torch.Tensor | None, ...]] = {}

    @classmethod
    def in_slots(
        cls,
        slots: Sequence[int],
        indices: Sequence[torch.Tensor],
        sees: Sequence[torch.Tensor] | None = None,
    ) -> RaggedQueries:
        """Queries of requests that each have a slot of contiguous K/V."""
        pages = torch.tensor(slots, device=indices[0].device)[:, None]
        batch = cls(indices, pages, sees=sees)
        batch.pages = list(slots)
        return batch

    @property
    def num_requests(self) -> int:
        return len(self.lengths)

    @property
    def num_queries(self) -> int:
        return sum(self.lengths)

    @property
    def last_key(self) -> torch.Tensor:
        """``[num_queries]`` int32: the last key that each query sees."""
        return self.index if self.sees is None else self.sees

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """``[num_requests + 1]`` int32: request r's queries are rows ``[cu[r], cu[r + 1])``."""
        return torch.tensor(self._starts, dtype=torch.int32, device=self.index.device)

    @cached_property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys that a request's last query sees; 0 without queries."""
        if not self.num_queries:
            return (0,) * self.num_requests
        lasts = self.last_key[[max(0, end - 1) for end in self._starts[1:]]].tolist()
        return tuple(last + 1 if n else 0 for last, n in zip(lasts, self.lengths, strict=True))

    @cached_property
    def pages(self) -> list[int] | None:
        """Each request's one page, or None if requests have several."""
        if self.block_table.shape[1] > 1:
            return None
        pages: list[int] = self.block_table[:, 0].tolist()
        return pages

    @cached_property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[num_queries]`` int64 each: every query's page and token index, if requests have one
        page each."""
        lengths = torch.tensor(self.lengths, device=self.index.device)
        pages = (
            self.block_table[:, 0].long().repeat_interleave(lengths, output_size=self.num_queries)
        )
        return pages, self.index.long()

    @property
    def max_kv_len(self) -> int:
        return max(self.kv_lens, default=0)

    def packed(self) -> RaggedQueries:
        """The same queries over K/V of these requests alone, one page each, in their order."""
        pages = torch.arange(self.num_requests, device=self.index.device)[:, None]
        lengths = list(self.lengths)
        sees = None if self.sees is None else self.sees.split(lengths)
        return RaggedQueries(self.index.split(lengths), pages, self.kv_lens, sees)

    def chunks(self, scoring: Scoring = PLAIN) -> tuple[Chunk, ...]:
        """The queries in even pieces of at most `CHUNK`; a whole prompt that sees all is one causal
        piece."""
        key = (*scoring.span, scoring.fused)
        if key not in self._chunks:
            self._chunks[key] = tuple(self._cut(scoring))
        return self._chunks[key]

    def _cut(self, scoring: Scoring) -> Iterator[Chunk]:
        index, last_key = self._tokens
        for request, n in enumerate(self.lengths):
            first = self._starts[request]
            whole = n > 0 and index[first + n - 1] == n - 1 and self.sees is None
            if whole and scoring.fused and not scoring.first_key(n - 1):
                yield Chunk(request, first, first + n, 0, n, causal=True)
                continue
            pieces = -(-n // CHUNK)
            for piece in range(pieces):
                start, end = first + n * piece // pieces, first + n * (piece + 1) // pieces
                first_key = scoring.first_key(index[start])
                yield Chunk(request, start, end, first_key, last_key[end - 1] + 1, causal=False)

    def masks(
        self, dtype: torch.dtype, scoring: Scoring = PLAIN
    ) -> tuple[torch.Tensor | None, ...]:
        """For each chunk its additive mask ``[queries, kv_len - first_key]``, or None if it needs
        none."""
        key = (*scoring.span, scoring.fused, dtype)
        if key not in self._masks:
            self._masks[key] = tuple(
                self._mask(chunk, dtype, scoring) for chunk in self.chunks(scoring)
            )
        return self._masks[key]

    def _mask(self, chunk: Chunk, dtype: torch.dtype, scoring: Scoring) -> torch.Tensor | None:
        if chunk.causal or chunk.end - chunk.start == 1:
            return None
        index = self.index[chunk.start : chunk.end, None]
        keys = torch.arange(chunk.first_key, chunk.kv_len, device=index.device)[None]
        hidden = keys > self.last_key[chunk.start : chunk.end, None]
        if scoring.window is not None:
            hidden |= keys <= index - scoring.window
        if scoring.chunk is not None:
            hidden |= keys // scoring.chunk < index // scoring.chunk
        mask = torch.zeros(hidden.shape, dtype=dtype, device=index.device)
        return mask.masked_fill_(hidden, float("-inf"))

    @cached_property
    def _tokens(self) -> tuple[list[int], list[int]]:
        """`index` and `last_key` on the host."""
        index: list[int] = self.index.tolist()
        return index, index if self.sees is None else self.sees.tolist()

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for n in self.lengths:
            starts.append(starts[-1] + n)
        return starts
