"""What the scheduler side tells the workers each step, and what they report back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.reuse.orders import Report


@dataclass(frozen=True, slots=True)
class Load:
    """Fill positions ``[start, end)`` of a request.

    Attributes:
        namespace: its donors', checked again when they are read.
        pieces: who owns the KV of `kept`, ascending.
        kept: spans inside ``[start, end)`` whose KV is written from donors.
        compute: spans inside ``[start, end)`` that the model runs on; with `kept` they tile it.
        token_ids: ``[end]`` int64.
        positions: ``[3, end]`` rotary positions; None: the index.
        block_ids: its blocks, from position 0 on.
    """

    request_id: str
    namespace: str
    pieces: tuple[Piece, ...]
    kept: tuple[Span, ...]
    compute: tuple[Span, ...]
    token_ids: np.ndarray
    positions: np.ndarray | None
    block_ids: tuple[int, ...]

    @property
    def end(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Save:
    """Take up a finished request as a donor.

    Attributes:
        node: what it becomes; its rows are read out of the blocks.
        block_ids: its blocks, held until the save is reported.
        last_token: token at `last`, the prompt's last position: what it looked at is recorded.
    """

    request_id: str
    node: Node
    block_ids: tuple[int, ...]
    last: int
    last_token: int


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """One step's orders, the same for all ranks and carried out in this order.

    Attributes:
        touched: nodes that were asked for again.
        dropped: nodes that are to be deleted.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What happened in a step, of one rank or of all together.

    Attributes:
        kv: what became of stored KV.
        failed: why loads failed, by request.
        obstacle: why a rank cannot take part at all, or None.
    """

    kv: Report = field(default_factory=Report)
    failed: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None

    def aggregate(self, other: Any) -> WorkerReport:
        """Both reports as one."""
        self.kv.add(other.kv)
        self.failed.update(other.failed)
        self.obstacle = self.obstacle or other.obstacle
        return self

    @property
    def empty(self) -> bool:
        return self.kv.empty and not (self.failed or self.obstacle)
