"""What the scheduler side tells the workers each step, and what they report back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.reuse.audits import Compared
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
        held: its blocks are held on: it will be audited.
    """

    request_id: str
    node: Node
    block_ids: tuple[int, ...]
    last: int
    last_token: int
    held: bool = False


@dataclass(frozen=True, slots=True)
class AuditStep:
    """Compute a chunk of a finished request, in the blocks that are held for it.

    Attributes:
        span: its positions.
        what: ``served``: over the KV that it was served with, which stays as it is, and keep the
            logits; ``compute``: anew, into its blocks; ``compare``: the same, and the logits are
            compared with those that were kept.
        token_ids: ``[N]`` int64 of the request.
        positions: ``[3, N]`` rotary positions; None: the index.
        block_ids: its blocks.
    """

    request_id: str
    span: Span
    what: Literal["served", "compute", "compare"]
    token_ids: np.ndarray
    positions: np.ndarray | None
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """A chunk of an audit is done.

    Attributes:
        compared: the answer's first tokens, after ``compare``, from one rank.
        failed: it could not be computed.
    """

    request_id: str
    compared: tuple[Compared, ...] = ()
    failed: bool = False


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """One step's orders, the same for all ranks and carried out in this order.

    Attributes:
        touched: nodes that were asked for again.
        dropped: nodes that are to be deleted.
        early: a prompt that is computed in this step, and answered from now on.
        audit: a chunk of an audit.
        heal: keep this instead of what the request was saved as; its blocks are given back.
        released: requests whose blocks are given back: their audits are over.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    early: Save | None = None
    audit: AuditStep | None = None
    heal: Save | None = None
    released: list[str] = field(default_factory=list)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What happened in a step, of one rank or of all together.

    Attributes:
        kv: what became of stored KV.
        failed: why loads failed, by request.
        obstacle: why a rank cannot take part at all, or None.
        audit: what became of the chunk that was ordered.
    """

    kv: Report = field(default_factory=Report)
    failed: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None
    audit: AuditReport | None = None

    def aggregate(self, other: Any) -> WorkerReport:
        """Both reports as one."""
        self.kv.add(other.kv)
        self.failed.update(other.failed)
        self.obstacle = self.obstacle or other.obstacle
        if self.audit is None:
            self.audit = other.audit
        elif other.audit is not None:  # of the same chunk: all ranks get the same orders
            compared, failed = (
                self.audit.compared or other.audit.compared,
                self.audit.failed or other.audit.failed,
            )
            self.audit = AuditReport(self.audit.request_id, compared, failed)
        return self

    @property
    def empty(self) -> bool:
        return self.kv.empty and not (self.failed or self.obstacle or self.audit)
