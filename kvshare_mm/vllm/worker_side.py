"""The worker side: carries out loads and saves of one rank, between vLLM's forwards.

All ranks get the same orders and must run the same forwards, or they would wait for each other for
ever. So what can go wrong on one rank alone, reading donors, is over before the first forward, and
the ranks agree on it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.node import Span
from kvshare_mm.reuse.editor import Placement
from kvshare_mm.reuse.orders import Report
from kvshare_mm.reuse.worker import ReuseWorker
from kvshare_mm.vllm.forward import Part, PartialForward
from kvshare_mm.vllm.meta import Load, Orders, Save, WorkerReport
from kvshare_mm.vllm.pages import Pages
from kvshare_mm.vllm.recompute import Head, Recompute

logger = logging.getLogger(__name__)

# What is edited before it goes into the pages: on a CPU little, which stays in its caches;
# elsewhere every round costs launches.
_STAGED_BYTES = {"cpu": 16 << 20, "gpu": 256 << 20}


@dataclass(slots=True)
class _Running:
    """A load that is under way: its donors' KV is in the pages, `todo` is left to compute."""

    load: Load
    todo: deque[Span] = field(default_factory=deque)


class WorkerSide:
    """Loads and saves of one rank.

    Args:
        layers: the model's attention layers in order, caches bound.
        pages: where K and V are in their pages.
        forward: runs the model.
        worker: this rank's share of the donors' KV.
        gone: what the store dropped; it is appended to from any thread.
        agree: whether all ranks say yes.
        head: the model's, see `Recompute`.
        budget: most tokens that loads compute in one step.
    """

    def __init__(
        self,
        layers: dict[str, Any],
        pages: Pages,
        forward: PartialForward,
        worker: ReuseWorker,
        gone: deque[str],
        agree: Callable[[bool], bool],
        head: Head,
        budget: int,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self._layers = layers
        self._pages = pages
        self._forward = forward
        self._worker = worker
        self._gone = gone
        self._agree = agree
        self._recompute = Recompute(forward, head)
        self._budget = budget
        self._loads: list[_Running] = []
        self._waiting: deque[Load] = deque()
        self._saves: deque[Save] = deque()
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self._report = WorkerReport()
        self._greeted = False
        for node, _ in worker.store.records():
            self._report.kv.restored.append(node)

    def step(self, orders: Orders) -> None:
        """Carry out a step's orders, loads as far as the budget goes. One request is saved, a
        forward of its own: of several that end together the others wait, not those who decode."""
        self._waiting.extend(orders.loads)
        start = time.perf_counter()
        if self._advance():
            self.times.setdefault("load_seconds", []).append(time.perf_counter() - start)
        self._saves.extend(orders.saves)
        for request_id in orders.released:
            self._release(request_id)
        if orders.early is not None:
            self._save(orders.early)  # at once: nobody holds its blocks
        elif self._saves:
            self._save(self._saves.popleft())
        if orders.audit is not None:
            self._report.audit = self._recompute.step(orders.audit)
        if orders.heal is not None:
            self._heal(orders.heal)
        self._worker.carry_out(orders.touched, orders.dropped)

    def finished(self) -> tuple[set[str], set[str], set[str]]:
        """Requests saved, requests loaded, and those of the latter whose load failed."""
        sent, received = self._sent, self._received
        self._sent, self._received = set(), set()
        return sent, received, received & self._report.failed.keys()

    def report(self) -> WorkerReport | None:
        """What happened since the last report; None: nothing, but for the first."""
        while self._gone:
            self._report.kv.gone.add(self._gone.popleft())
        report, self._report = self._report, WorkerReport()
        first, self._greeted = not self._greeted, True
        return report if first or not report.empty else None

    def close(self) -> None:
        self._worker.store.close()

    # -- loads ------------------------------------------------------------------------------

    def _begin(self, load: Load) -> None:
        """Put the donors' KV of a load into its pages."""
        reason = None
        placement = None
        try:
            placement = self._placed(load)
        except KVUnavailableError as error:
            logger.info("computing %s in full: %s", load.request_id, error)
            reason = error.reason
        except Exception:
            # A cache problem is never a request's problem.
            logger.exception("loading %s failed; computing it in full", load.request_id)
            reason = "edit_error"
        if not self._agree(reason is None) or placement is None:
            self._report.failed[load.request_id] = reason or "other_rank"
            self._received.add(load.request_id)
            return
        self._fill(load, placement)
        self._loads.append(_Running(load, deque(load.compute)))

    def _placed(self, load: Load) -> Placement:
        """Donors of what is kept, whose KV goes into rows one behind the other."""
        kept = np.zeros(load.end, np.int64)
        for span in load.kept:
            kept[span.start : span.end] = 1
        shape = len(self._layers), self._pages.num_kv_heads, self._pages.key_dim
        rows = kept.cumsum() - kept
        return self._worker.place(load.pieces, load.namespace, shape, load.positions, rows)

    def _fill(self, load: Load, placement: Placement) -> None:
        """Write what is kept into its pages, a few layers after the others."""
        layers = list(self._layers.values())
        slots = self._forward.slots(load.kept, load.block_ids)
        like = layers[0].kv_cache
        heads, dims = self._pages.num_kv_heads, (self._pages.key_dim, self._pages.value_dim)
        dtype = self._pages.dtype
        room = _STAGED_BYTES["cpu" if like.device.type == "cpu" else "gpu"]
        step = min(len(layers), max(1, room // (len(slots) * heads * sum(dims) * like.itemsize)))
        k, v = (
            torch.empty((step, len(slots), heads, dim), dtype=dtype, device=like.device)
            for dim in dims
        )
        with torch.inference_mode():
            for first in range(0, len(layers), step):
                some = layers[first : first + step]
                of_some = k[: len(some)], v[: len(some)]
                slot_k, slot_v = (x.transpose(1, 2) for x in of_some)
                self._worker.write(placement, slot_k, slot_v, first)
                for layer, of_k, of_v in zip(some, *of_some, strict=True):
                    self._pages.write(layer, of_k, of_v, slots)

    def _advance(self) -> bool:
        """Begin and compute loads as far as the budget allows, in one forward; False: there are
        none."""
        left = self._budget
        asked = sum(span.length for running in self._loads for span in running.todo)
        while self._waiting and asked < left:
            load = self._waiting.popleft()
            asked += sum(span.length for span in load.compute)
            self._begin(load)
        parts = []
        for running in self._loads:
            load, spans = running.load, []
            while running.todo and left:
                span = running.todo.popleft()
                if span.length > left:
                    running.todo.appendleft(Span(span.start + left, span.end))
                    span = Span(span.start, span.start + left)
                spans.append(span)
                left -= span.length
            if spans:
                parts.append(Part(spans, load.token_ids, load.positions, load.block_ids))
        if parts:
            self._forward.run(parts)
            self.counters["gap_tokens"] += self._budget - left
        done = [running for running in self._loads if not running.todo]
        self._received.update(running.load.request_id for running in done)
        self._loads = [running for running in self._loads if running.todo]
        return bool(parts or done)

    # -- saves ------------------------------------------------------------------------------

    def _save(self, save: Save) -> None:
        """Take up a request; whatever happens, its blocks are given back, unless they are held."""
        if not save.held:
            self._sent.add(save.request_id)
        try:
            attention, k, v = self._read(save)
        except Exception:
            # A cache problem is never a request's problem.
            logger.exception("%s could not be read", save.request_id)
            self._report.kv.not_saved[save.node.node_id] = "failed"
            return
        report = self._worker.save(replace(save.node, attention=attention), k, v)
        if attention is not None:
            report.attention[save.node.node_id] = attention
        self._report.kv.add(report)

    def _release(self, request_id: str) -> None:
        """Give blocks back that were held, once the request is saved."""
        for i, save in enumerate(self._saves):
            if save.request_id == request_id:
                self._saves[i] = replace(save, held=False)
                return
        self._sent.add(request_id)

    def _heal(self, save: Save) -> None:
        """Keep a request that was computed in full, on all ranks or on none."""
        self._sent.add(save.request_id)
        node_id, kv = save.node.node_id, None
        try:
            kv = self._read(save)
        except Exception:
            # A cache problem is never a request's problem.
            logger.exception("%s could not be read", save.request_id)
        here = self._worker.store.resident(node_id) is not None
        if not self._agree(kv is not None and here) or kv is None:
            self.counters["heal_failed"] += 1
            return
        attention, k, v = kv
        node = save.node if attention is None else replace(save.node, attention=attention)
        try:
            if self._worker.replace(node, k, v):
                mass = {} if attention is None else {node_id: attention}
                self._report.kv.add(Report({node_id: 1}, mass))
        except Exception:
            self.counters["heal_failed"] += 1
            logger.exception("could not heal %s", node_id)

    def _read(self, save: Save) -> tuple[np.ndarray | None, torch.Tensor, torch.Tensor]:
        """What the prompt's last position looks at, and the request's K and V."""
        node = save.node
        length = max(save.last + 1, node.own[-1].end if node.own else 0)
        caches = [layer.kv_cache for layer in self._layers.values()]
        blocks = self._forward.table(save.block_ids)[: -(-length // caches[0].shape[-2])]
        kv = [self._pages.read(cache, blocks, length) for cache in caches]
        place = None if node.positions is None else node.positions[:, save.last]
        attention = None
        if not any(m.start <= save.last < m.end for m in node.media):  # its token says nothing
            attention = self._forward.looked_at(
                save.last, save.last_token, place, save.block_ids, kv, self._pages
            )
        k, v = (torch.stack([each[i] for each in kv]) for i in range(2))
        return attention, k, v
