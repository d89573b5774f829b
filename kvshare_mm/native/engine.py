"""The engine's loop: a chunk of a prompt, then a decode step batched over all active requests.

One thread runs the model. Prompts are computed one after the other, but one that takes many chunks
holds up neither answers nor prompts of one chunk: they come in between.

A second thread saves prompts as donors when they are computed, and answers when they are out. Who
waits already, or comes behind an answer, waits for the saves of its namespace, and finds them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from functools import partial
from operator import eq

import torch

from kvshare_mm.errors import (
    EngineClosedError,
    InvalidRequestError,
    ModelOutputError,
    QueueFullError,
)
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.native.acceptance import Families
from kvshare_mm.native.audit import Audit, Auditor
from kvshare_mm.native.drafts import Drafter
from kvshare_mm.native.fair_queue import ANSWER_TOKEN, PROMPT_TOKEN
from kvshare_mm.native.prefill import Prefiller, PrefillResult, provenance
from kvshare_mm.native.request import SlotRequest
from kvshare_mm.native.saver import Saver, save_request
from kvshare_mm.native.searcher import Searches
from kvshare_mm.native.slots import ModelRunner, works
from kvshare_mm.native.step import step
from kvshare_mm.native.waiting import WaitingRequests
from kvshare_mm.outputs import FinishReason, count_use
from kvshare_mm.request import RequestSpec, Sink
from kvshare_mm.reuse.donors import DonorPool

logger = logging.getLogger(__name__)

# So many requests fail in a row, and the model alone too, before the engine is called unhealthy.
_MAX_FAILURES = 3
# Drafted tokens in a decode step, all requests together: few rows cost little more than one.
_MOST_DRAFTED = 16


class NativeEngine:
    """Serves one model.

    Args:
        loaded: the model.
        runner: its forward passes.
        prefiller: fills slots.
        donors: takes up finished requests; None: nothing is stored.
        max_model_len: longest prompt plus answer.
        max_queue: requests that may wait, see `FairQueue`.
        auditor: computes some requests in full when nothing else is to do; None: nobody does.
        help_s: longest that a prompt waits to hear whether other replicas have a donor for it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        runner: ModelRunner,
        prefiller: Prefiller,
        donors: DonorPool | None,
        max_model_len: int,
        max_queue: int,
        auditor: Auditor | None = None,
        help_s: float = 0.015,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._loaded = loaded
        self._runner = runner
        self._prefiller = prefiller
        self._donors = donors
        self._auditor = auditor
        self.max_model_len = max_model_len
        self._changed = threading.Condition()
        self._saver = Saver(self._changed)
        self._waiting = WaitingRequests(max_queue, self._saver, runner.chunk)
        self._free = list(range(runner.num_slots))
        self._active: list[SlotRequest] = []
        self._known: dict[str, SlotRequest] = {}
        self._closing = False
        self._failures = 0
        self._families = Families()
        self._thread = threading.Thread(target=self._run, name="kvshare-engine", daemon=True)
        self._thread.start()
        self._searches = Searches(donors, prefiller, self._changed, help_s)

    # -- called from any thread -------------------------------------------------------------

    def submit(self, spec: RequestSpec, sink: Sink) -> str:
        """Queue a request; chunks and at last its output, or an error, go to `sink`.

        Raises:
            InvalidRequestError: empty prompt, or one longer than the context.
            QueueFullError: too many requests are waiting.
            EngineClosedError: the engine was closed or has died.
        """
        spec.check(self.max_model_len)
        request = SlotRequest(spec, sink)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise EngineClosedError("the engine is closed")
            if spec.options.reuse != "off":
                self._waiting.hold(request, self._saver.last.get(spec.namespace, 0))
                self._searches.hold(request)
            must_wait = bool(self._waiting) or not self._free
            try:
                self._waiting.add(spec.options.tenant, request)
            except QueueFullError:
                self.counters["queue_full"] += 1
                raise
            self._known[request.request_id] = request
            self._changed.notify_all()
        self._searches.look(request, must_wait)
        return request.request_id

    def cancel(self, request_id: str) -> None:
        """End a request at its next token; an unknown or finished one is not an error."""
        with self._changed:
            if request := self._known.get(request_id):
                request.cancelled = True
                self._changed.notify_all()

    def wait_saved(self, timeout_s: float | None = None) -> bool:
        """Wait until all requests finished so far are donors; False if time ran out."""
        with self._changed:
            last = self._saver.ordered
            return self._changed.wait_for(lambda: self._saver.done >= last, timeout_s)

    def wait_audited(self, timeout_s: float | None = None) -> bool:
        """Wait until no audit waits and their nodes are healed; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(
                lambda: (self._saver.idle and not len(self._auditor or ())) or self._closing,
                timeout_s,
            )

    @property
    def healthy(self) -> bool:
        """Whether requests can be expected to be answered."""
        return not self._closing and self._failures < _MAX_FAILURES

    @property
    def stuck_s(self) -> float:
        """Seconds for which requests have been there and no layer of the model was computed."""
        now = time.perf_counter()
        oldest = min((r.submitted for r in [*self._known.values()]), default=now)
        return max(0.0, now - max(oldest, self._runner.moved_s))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._active)

    def close(self) -> None:
        """Abort what is in flight, save what is finished, stop the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._saver.close()
        self._searches.close()

    # -- the engine's thread ----------------------------------------------------------------

    def _run(self) -> None:
        error: Exception = EngineClosedError("the engine was closed")
        try:
            while self._step():
                pass
        except Exception as failure:
            logger.exception("the engine died")
            error = EngineClosedError(f"the engine died: {failure}")
        with self._changed:
            self._closing = True
            left = list(self._known.values())  # one that was about to start is in no other list
            self._active.clear()
            self._waiting.clear()
            self._known.clear()
        for request in left:
            request.emit(error)

    def _step(self) -> bool:
        """A chunk of a prompt and one decode step; waits if there is nothing to do."""
        with self._changed:
            while not (self._closing or self._active or self._next() or self._waiting.gone):
                held = self._waiting and self._free
                audit_s = None if held else self._audit_s()
                if audit_s == 0:
                    break
                self._changed.wait(self._waiting.longest_s if held else audit_s)
            if self._closing:
                return False
            gone = self._waiting.drop_gone()
            request = self._next()
            if request is not None:
                self._waiting.start(request)
                self._active.append(request)
                slot = self._free.pop()
            idle = not (self._active or gone)
        for dropped in gone:
            self._finish(dropped, "abort")
        if request is not None:
            self._start(request, slot)
        if self._active:
            self._compute()
        if idle:
            self._audit()
        return True

    def _audit_s(self) -> float | None:
        """Seconds until an audit may go on; None: none can. Lock held."""
        if not self._auditor or not self._free or not self._saver.idle:
            return None
        return self._auditor.wait_s

    def _audit(self) -> None:
        """A chunk of an audit, in a free slot: the one that is taken last if somebody comes."""
        assert self._auditor is not None
        audit = self._auditor.work(self._free[0], lambda: bool(self._waiting) or self._closing)
        with self._changed:
            if audit is not None:
                self._auditor.remove(audit)
                self._free.remove(audit.slot)
                self._saver.order(partial(self._heal, audit))
            self._changed.notify_all()

    def _next(self) -> SlotRequest | None:
        """The request that starts next, if one can. Lock held."""
        return self._waiting.first(self._active) if self._free else None

    def _start(self, request: SlotRequest, slot: int) -> None:
        """Plan a prompt, and load what it reuses."""
        spec = request.spec
        if self._auditor is not None:
            self._auditor.taken(slot)
        try:
            request.begin(slot, self._loaded.tokenizer, self._loaded.device, self.max_model_len)
            request.computing = self._prefiller.begin(
                slot,
                spec.stream,
                spec.namespace,
                reuse=spec.options.reuse or "similar",
                policy=spec.options.policy,
                similar=request.similar,
                store=spec.options.store,
            )
        except Exception as failure:
            self._fail(request, failure)

    def _compute(self) -> None:
        """A chunk of a prompt, with its last one the first token, and all answers' next tokens."""
        for request in [r for r in self._active if r.cancelled]:
            self._finish(request, "abort")
        batch = [r for r in self._active if r.prefill is not None]
        for request in batch:
            request.propose(_MOST_DRAFTED // len(batch), len(batch))
        begun = next((r for r in self._active if r.computing), None)
        prompt = begun.computing if begun else None
        done = prompt.done if prompt else 0
        result, logits = step(self._runner, prompt, batch, alone=len(self._active) == 1)
        for request, rows in zip(batch, logits, strict=True):
            if isinstance(rows, Exception):
                self._fail(request, rows)
            else:
                self._take(request, rows)
        if begun is None or prompt is None:
            return
        self._charge(begun, PROMPT_TOKEN * (prompt.done - done))
        if isinstance(result, Exception):
            self._fail(begun, result)
        elif result is not None:
            self._prefilled(begun, result)
        else:
            self._active.append(self._active.pop(self._active.index(begun)))  # the others' turn

    def _prefilled(self, request: SlotRequest, result: PrefillResult) -> None:
        """A prompt is computed."""
        request.prefill = result
        request.computing = None
        plan = result.plan
        self._searches.computed(result)
        count_use(self.counters, provenance(result))
        self.counters["prompt_tokens"] += plan.num_tokens
        if self._auditor is not None:
            request.audit = self._auditor.draw(request.spec, plan, request.token_ids)
        self._accept(request, result.logits)
        if request in self._active and self._runner.can_draft:
            donors = self._donors
            family = donors.reuse.catalogue.family(plan.edited_from) if donors else None
            acceptance = self._families.acceptance(request.spec.namespace, family)
            request.drafter = Drafter(request.spec.stream.token_ids, result.likely, acceptance)
            request.drafter.add(request.token_ids)
        if request in self._active and self._donors is not None and request.becomes_donor:
            self._save_prompt(request)

    def _save_prompt(self, request: SlotRequest) -> None:
        """Its prompt is a donor while its answer is made: requests that are alike come together."""
        ns = request.spec.namespace
        with self._changed:
            self._saver.order(partial(save_request, self._prefiller, self.counters, request), ns)
            number = self._saver.last[ns]
            waiting = list(self._waiting)
        # Nobody who submits waits while prompts are compared.
        overlaps = [(r, r.overlap_with(request)) for r in waiting if r.is_like(request)]
        with self._changed:
            for other, overlap in overlaps:
                self._waiting.hold(other, number)
                other.overlap = max(other.overlap, overlap)

    def _take(self, request: SlotRequest, rows: torch.Tensor) -> None:
        """The answer goes on: with what of the draft is right, and a token behind that."""
        said = len(request.token_ids)
        for drafted, logits in zip((*request.draft, None), rows, strict=True):
            self._accept(request, logits)
            if request.cancelled or request not in self._active or request.token_ids[-1] != drafted:
                break
        new = request.token_ids[said:]
        self.counters["answer_forwards"] += 1
        self.counters["draft_tokens"] += len(request.draft)
        self.counters["draft_accepted"] += sum(map(eq, request.draft, new))
        if request.drafter is not None:
            request.drafter.add(new)

    def _charge(self, request: SlotRequest, amount: int) -> None:
        with self._changed:
            self._waiting.charge(request.spec.options.tenant, amount)

    def _accept(self, request: SlotRequest, logits: torch.Tensor) -> None:
        self._charge(request, ANSWER_TOKEN)
        try:
            reason = request.accept(logits, self._loaded.eos_token_ids)
        except Exception as failure:  # logits that are no numbers: there is nothing to draw from
            self._fail(request, failure)
            return
        if request.audit is not None:
            request.audit.keep(logits)
        if reason is not None:
            self._finish(request, reason)

    def _fail(self, request: SlotRequest, failure: Exception) -> None:
        """One request that the model cannot take must not end the others."""
        self._active.remove(request)
        asked_wrongly = isinstance(failure, InvalidRequestError)
        trace = None if asked_wrongly else failure
        logger.error("request %s failed: %s", request.request_id, failure, exc_info=trace)
        self.counters["failed"] += 1
        with self._changed:  # its prompt may be about to be read where others will write
            self._changed.wait_for(lambda: self._saver.idle)
        if request.node_id is not None and self._donors is not None:
            self._donors.delete(request.node_id)  # what failed may have been wrong before
        if request.slot >= 0 and not asked_wrongly and not isinstance(failure, ModelOutputError):
            self._failures = 0 if works(self._runner, request.slot) else self._failures + 1
        self._release(request)
        request.emit(failure)

    def _finish(self, request: SlotRequest, reason: FinishReason) -> None:
        if request in self._active:
            self._active.remove(request)
        if reason != "abort":
            self._failures = 0
        self.counters[f"finished_{reason}"] += 1
        self.counters["generation_tokens"] += len(request.token_ids)
        if self._auditor is not None and request.audit is not None and reason != "abort":
            self._auditor.add(request.audit)
        saved = self._donors is not None and request.becomes_donor
        if saved:
            save = partial(save_request, self._prefiller, self.counters, request, self._release)
            with self._changed:
                # Before the caller hears of the end: a flush waits for it, and what it asks next.
                self._saver.order(save, request.spec.namespace)
        request.finish(reason)
        with self._changed:
            self._known.pop(request.request_id, None)
        if not saved:
            self._release(request)

    def _release(self, request: SlotRequest) -> None:
        if request.slot >= 0:
            self._runner.release(request.slot)
        with self._changed:
            self._known.pop(request.request_id, None)
            if request.slot >= 0:
                self._free.append(request.slot)
            self._changed.notify_all()

    def _heal(self, audit: Audit) -> None:
        """On the save thread."""
        assert self._auditor is not None and self._donors is not None
        self._auditor.heal(audit, self._donors)
        with self._changed:
            self._free.insert(0, audit.slot)
