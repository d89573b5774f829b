"""Audits on the scheduler side: finished requests that reused KV approximately are computed in full
while nobody asks, and compared with what they were served with.

The blocks of a request that is drawn are held: they have the KV that it was served with, answer
included. In steps that would be empty, a chunk of it is computed, so who comes meanwhile waits for
one chunk at most. Who needs the blocks gets them, and the audit is given up.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvshare_mm.node import Span
from kvshare_mm.reuse.audits import CHUNK, STEPS, Compared, Divergence, changed_facts, drawn, learn
from kvshare_mm.reuse.calibration import Calibration
from kvshare_mm.reuse.plan import Promise, ReusePlan
from kvshare_mm.reuse.scheduler import ReuseScheduler
from kvshare_mm.vllm import compat
from kvshare_mm.vllm.lookup import Lookup
from kvshare_mm.vllm.meta import AuditReport, AuditStep, Orders, Save

# Audits that wait, and their tokens: vLLM does not end before they are over.
_MAX_WAITING, _MAX_TOKENS = 16, 1 << 14
# They hold one in so many of all blocks, but for one request.
_SHARE_OF_BLOCKS = 8


@dataclass(eq=False, slots=True)
class _Audit:
    """A request that is to be audited.

    Attributes:
        steps: what is left to compute.
        save: as what it was stored; None: it was not, and nothing is healed.
        result: what was found, or why nothing was.
    """

    request_id: str
    namespace: str
    plan: ReusePlan
    promise: Promise
    prompt: np.ndarray = field(repr=False)
    block_ids: tuple[int, ...]
    length: int
    steps: deque[AuditStep]
    save: Save | None
    result: str = ""


class Audits:
    """Draws requests, holds their blocks, has them computed and learns from what is found.

    Only vLLM's scheduler loop calls it.

    Args:
        reuse: the donors; what is found is counted there.
        calibration: learns from them.
        share: of the requests that reuse approximately; of the first, more (see `drawn`).
        budget: tokens that are computed a second, at most.
        times: divergences (nats) go here on their way to vLLM's metrics.
        later: calls something in another thread.
        tokenizer: tells numbers and names; None: no facts are compared.
        seed: of the draw.
    """

    def __init__(
        self,
        reuse: ReuseScheduler,
        calibration: Calibration,
        share: float,
        budget: float,
        times: dict[str, list[float]],
        later: Callable[[Callable[[], None]], Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
    ) -> None:
        self.pool: Any = None  # vLLM's block pool
        self._reuse = reuse
        self._calibration = calibration
        self._share = share
        self._budget = budget
        self._times = times
        self._later = later
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._waiting: deque[_Audit] = deque()
        self._under_way = False
        self._released: list[str] = []
        self._leaving: set[str] = set()
        self._not_before = 0.0

    # -- a finished request -----------------------------------------------------------------

    def draw(
        self,
        request: Any,
        lookup: Lookup,
        length: int,
        block_ids: list[int],
        save: Save | None,
    ) -> bool:
        """Whether a request that is over will be audited; its blocks are held then.

        Args:
            length: positions whose KV was computed.
            save: what it is stored as, if it is.
        """
        plan, stream, first = lookup.used, lookup.stream, lookup.approximate_from
        if plan is None or stream is None or first is None or request.num_preemptions:
            return False
        known = self._calibration.audits(lookup.namespace)
        promise = drawn(plan, self._share, self._random, known)
        if promise is None:
            return False
        if any(item.end > first for item in stream.media):
            # vLLM's encoder does not run for what no request computes.
            self._reuse.counters["audits_no_features"] += 1
            return False
        ids = np.asarray(request.all_token_ids[:length], np.int64)
        positions, blocks = stream.positions_to(length), tuple(block_ids)
        prompt = request.num_prompt_tokens
        steps = deque(
            AuditStep(request.request_id, span, what, ids, positions, blocks)
            for what, span in _chunks(first, prompt - 1, length, save is not None)
        )
        audit = _Audit(
            request.request_id,
            lookup.namespace,
            plan,
            promise,
            ids[:prompt],
            blocks,
            length,
            steps,
            save,
        )
        self._waiting.append(audit)
        while len(self._waiting) > 1 and self._too_much:
            self._end(self._waiting[0], "dropped")
        return True

    @property
    def _too_much(self) -> bool:
        return (
            len(self._waiting) > _MAX_WAITING
            or sum(audit.length for audit in self._waiting) > _MAX_TOKENS
            or sum(len(audit.block_ids) for audit in self._waiting)
            > self.pool.num_gpu_blocks // _SHARE_OF_BLOCKS
        )

    @property
    def busy(self) -> bool:
        """Whether blocks are held."""
        return bool(self._waiting or self._leaving)

    # -- a step -----------------------------------------------------------------------------

    def order(self, orders: Orders, idle: bool) -> None:
        """Add to a step's orders.

        Args:
            idle: nobody asks for anything.
        """
        orders.released, self._released = self._released, []
        if not self._waiting or self._under_way or not idle:
            return
        now = time.monotonic()
        if now < self._not_before:
            return
        audit = self._waiting[0]
        if audit.steps:
            orders.audit = audit.steps.popleft()
            self._under_way = True
            self._not_before = now + orders.audit.span.length / self._budget
            return
        self._waiting.popleft()
        self._leave(audit)
        save = audit.save
        better = None if save is None else self._reuse.heal(save.node.node_id)
        if save is not None and better is not None:
            orders.heal = replace(save, node=better, held=False)
        else:
            orders.released.append(audit.request_id)

    def reported(self, report: AuditReport) -> None:
        """A chunk is done."""
        self._under_way = False
        audit = next((a for a in self._waiting if a.request_id == report.request_id), None)
        if audit is None:
            return  # it was given up meanwhile
        if report.failed:
            self._end(audit, "failed")
        elif report.compared:
            self._learn(audit, report.compared)

    def make_room(self) -> bool:
        """Give up all audits, so that others get their blocks; whether any will be free soon."""
        while self._waiting:
            self._end(self._waiting[0], "dropped")
        return bool(self._leaving)

    def give_way(
        self,
        lookups: Mapping[str, Lookup],
        request_of: Callable[[str], Any],
        num_scheduled: int,
    ) -> None:
        """Make room if somebody was not given blocks, and could have ours.

        Args:
            lookups: all requests by id, after vLLM has scheduled a step.
            request_of: vLLM's request of an id.
            num_scheduled: tokens that it computes in it.
        """
        if not self._waiting:
            return
        free = int(self.pool.get_num_free_blocks())
        refused = [
            lookup
            for request_id, lookup in lookups.items()
            if not lookup.waits and compat.needs_blocks(request_of(request_id))
        ]
        # Who had blocks before wants more of them than a prompt takes.
        short = any(x.num_blocks > free or x.local is not None for x in refused)
        if refused and (short or not num_scheduled):
            self.make_room()

    def given_back(self, request_ids: Collection[str]) -> None:
        """The blocks of requests are no longer held."""
        self._leaving.difference_update(request_ids)

    def close(self) -> None:
        """Keep what was learned."""
        self._calibration.save()

    # -- inside -----------------------------------------------------------------------------

    def _end(self, audit: _Audit, why: str) -> None:
        """Give an audit up; what was found already counts."""
        self._waiting.remove(audit)
        audit.result = audit.result or why
        self._released.append(audit.request_id)
        self._leave(audit)

    def _leave(self, audit: _Audit) -> None:
        self._leaving.add(audit.request_id)
        self._reuse.counters[f"audits_{audit.result}"] += 1

    def _learn(self, audit: _Audit, compared: tuple[Compared, ...]) -> None:
        promise = audit.promise
        facts = changed_facts(self._tokenizer, audit.plan, audit.prompt)
        found = Divergence.of(compared, facts, promise.asked)
        audit.result = learn(self._calibration, audit.namespace, promise, found)
        self._times.setdefault("divergence", []).append(found.value)
        self._later(self._calibration.save)


def _chunks(
    first: int, last: int, length: int, whole: bool
) -> Iterator[tuple[Literal["served", "compute", "compare"], Span]]:
    """What is computed, in order.

    Args:
        first: the first approximate position.
        last: the prompt's last: its logits chose the answer's first token.
        length: positions that have KV.
        whole: all of them, not only those that are compared.
    """
    answer = Span(last, min(last + STEPS, length))
    yield "served", answer
    for start in range(first, last, CHUNK):
        yield "compute", Span(start, min(start + CHUNK, last))
    yield "compare", answer
    for start in range(answer.end, length if whole else answer.end, CHUNK):
        yield "compute", Span(start, min(start + CHUNK, length))
