"""The scheduler side: looks donors up, decides what is loaded, keeps what is approximate apart.

Lives in vLLM's scheduler loop, so nothing here waits: plans are made in a thread, and a request
whose plan is late is computed in full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from kvshare_mm.config import RequestOptions
from kvshare_mm.errors import InvalidRequestError, KVUnavailableError
from kvshare_mm.index.ngrams import sketch
from kvshare_mm.learned import open_calibration
from kvshare_mm.node import spans_of
from kvshare_mm.outputs import Provenance, count_use
from kvshare_mm.reuse.catalogue import Found
from kvshare_mm.reuse.plan import Decline, ReusePlan
from kvshare_mm.reuse.repair import RepairPolicy
from kvshare_mm.reuse.scheduler import ReuseScheduler, namespace
from kvshare_mm.stream import MEDIA_BIT, SegmentStream
from kvshare_mm.vllm import compat
from kvshare_mm.vllm.audits import Audits
from kvshare_mm.vllm.bursts import Bursts
from kvshare_mm.vllm.gate import request_obstacle
from kvshare_mm.vllm.lookup import Lookup
from kvshare_mm.vllm.media import Positions, request_stream
from kvshare_mm.vllm.meta import Load, Orders, Save, WorkerReport
from kvshare_mm.vllm.options import ConnectorOptions, request_options
from kvshare_mm.vllm.saving import Saving
from kvshare_mm.vllm.spans import cut, kept_in_the_end, loadable_end, within
from kvshare_mm.vllm.stats import summary

logger = logging.getLogger(__name__)


class SchedulerSide:
    """KVShare's part of vLLM's scheduler.

    Args:
        options: the connector's.
        fingerprint: names the model: the first part of every namespace.
        block_size: tokens of a block.
        num_ranks: workers that must hold a donor before it is one.
        positions: of prompts with media; None: these are declined.

    Attributes:
        reuse: the donors.
        counters: events since they were last told to vLLM.
        times: what was observed by name, the same.
        obstacle: why nothing is shared in this deployment, or None.
        tokenizer: turns prompts back into text, for a search by meaning, which needs one.
        audits: of requests that reused approximately; None: there are none.
    """

    def __init__(
        self,
        options: ConnectorOptions,
        fingerprint: str,
        block_size: int,
        num_ranks: int,
        positions: Positions | None = None,
    ) -> None:
        core = options.core
        self.reuse = ReuseScheduler(core.host_budget(), core.max_candidates, num_ranks)
        self.counters = self.reuse.counters
        self.times: dict[str, list[float]] = {}
        self.obstacle: str | None = None
        self.tokenizer: Any = None
        self.audits: Audits | None = None
        self._options = options
        self.fingerprint = fingerprint
        self._block_size = block_size
        self._positions = positions
        self._planner = core.planner
        self._lookups: dict[str, Lookup] = {}
        self._bursts = Bursts(self._lookups, self.reuse)
        self._saving = Saving(core.reuse, self.reuse, self._text)
        self._loads: list[Load] = []
        self._saves: list[Save] = []
        self._heard = threading.Event()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="kvshare-lookup")

    def open_audits(self) -> None:
        """Use what audits taught, and audit if that is asked for; the tokenizer is there."""
        core = self._options.core
        calibration = open_calibration(core, self.reuse, self.fingerprint)
        if calibration is not None and core.audit_share:
            self.audits = Audits(
                self.reuse,
                calibration,
                core.audit_share,
                core.audit_budget,
                self.times,
                self._threads.submit,
                self.tokenizer,
            )

    # -- a new request ----------------------------------------------------------------------

    def add(self, request: Any) -> None:
        """Begin looking for donors."""
        salt = f"{self._options.core.cache_salt}\0{request.cache_salt or ''}"
        lookup = Lookup(
            namespace=namespace(self.fingerprint, salt),
            options=RequestOptions(),
            num_blocks=-(-request.num_prompt_tokens // self._block_size),
        )
        self._lookups[request.request_id] = lookup
        lookup.declined = "unsupported" if self.obstacle else request_obstacle(request)
        if lookup.declined is not None:
            return
        try:
            prompt = request.prompt_token_ids, request.mm_features
            lookup.stream = request_stream(*prompt, self._positions)
        except Exception:
            # A cache problem is never a request's problem.
            logger.exception("a prompt could not be read; computing in full")
            lookup.declined = Decline.LOOKUP_ERROR
            return
        if lookup.stream is None:
            lookup.declined = "media"
            return
        try:
            lookup.options = request_options(request.kv_transfer_params)
        except InvalidRequestError as error:
            logger.warning("%s is served without KVShare: %s", request.request_id, error)
            lookup.declined = "invalid_options"
            lookup.options = RequestOptions(store=False)  # it may have asked for just that
            return
        reuse = lookup.options.reuse or self._options.core.reuse
        if reuse == "off":
            lookup.declined = Decline.REUSE_OFF
            return
        lookup.exact = reuse == "exact"
        lookup.sketch = sketch(lookup.stream.align_keys)
        self._look(lookup)

    def _look(self, lookup: Lookup) -> None:
        """Have a plan made."""
        assert lookup.stream is not None
        policy = lookup.options.policy or self._options.core.policy
        # Who asks after an answer finds it, though it is still being stored.
        saving = self.reuse.saving(lookup.namespace)
        asked = lookup, lookup.stream, policy, saving
        lookup.deadline = time.monotonic() + self._options.lookup_deadline_s
        lookup.future = self._threads.submit(self._plan, *asked)

    def _plan(
        self, lookup: Lookup, stream: SegmentStream, policy: RepairPolicy, saving: list[str]
    ) -> ReusePlan:
        """In a thread of its own."""
        ns, exact = lookup.namespace, lookup.exact
        # What the workers found on disk comes with their first report.
        self._heard.wait(self._options.lookup_deadline_s)
        self.reuse.wait_saved(saving, self._options.lookup_deadline_s / 2)
        options = self._planner.but_exact_only() if exact else self._planner

        def find(similar: tuple[str, ...] = ()) -> Found:
            return self.reuse.find(stream, ns, options, policy, similar)

        found = find()
        plan = found.plan
        if not exact and not plan.num_reused and self.reuse.semantic is not None:
            similar = self.reuse.similar(self._text(stream.align_keys), ns)
            if similar:
                plan = find(similar).plan
        if not exact:
            lookup.overlap = self.reuse.catalogue.overlap(ns, stream.align_keys)
        self.times.setdefault("lookup_seconds", []).append(found.lookup)
        self.times.setdefault("plan_seconds", []).append(found.planning)
        return plan

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """How many tokens behind vLLM's own `local` ones a load gives; None: ask again."""
        lookup = self._lookups.get(request.request_id)
        if lookup is None:
            return 0, False
        lookup.asked = local
        if lookup.future is not None and not self._arrived(lookup):
            return None, False
        if lookup.behind is not None:
            if not self._bursts.waits(lookup):
                self._look(lookup)
            return None, False
        if self._bursts.hold(lookup, local):
            return None, False
        plan, stream = lookup.plan, lookup.stream
        if plan is None or stream is None:
            return 0, False
        end = loadable_end(plan, local, stream.media)
        stopped = end < loadable_end(plan, local)
        lookup.declined = "new_picture" if stopped else plan.declined
        kept = kept_in_the_end(plan)[local:end]
        if not kept.any() or kept.sum() < self._options.min_load_tokens:
            lookup.declined = lookup.declined or ("prefix_cache" if plan.runs else None)
            return 0, False
        try:
            self.reuse.catalogue.pieces(cut(plan, end))
        except KVUnavailableError as error:
            lookup.declined, lookup.plan = error.reason, None
            return 0, False
        return end - local, True

    def _arrived(self, lookup: Lookup) -> bool:
        """Take up a plan that is ready, or do without one that is late."""
        assert lookup.future is not None
        if not lookup.future.done():
            if time.monotonic() < lookup.deadline:
                return False
            lookup.declined = "lookup_late"
        else:
            try:
                lookup.plan = lookup.future.result()
                lookup.declined = lookup.plan.declined
            except Exception:
                # A cache problem is never a request's problem.
                logger.exception("donor lookup failed; computing in full")
                lookup.declined = Decline.LOOKUP_ERROR
        lookup.future = None
        return True

    def allocated(self, request: Any, block_ids: list[int], external: int) -> None:
        """vLLM gave a request its blocks; `external` tokens of them are ours to fill."""
        lookup = self._lookups.get(request.request_id)
        if lookup is None:
            return
        local = lookup.asked
        if external == 0:
            if lookup.local is None:
                lookup.local = local
                lookup.provenance = replace(lookup.provenance, exact=local)
            return
        assert lookup.plan is not None and lookup.stream is not None
        end = local + external
        plan = cut(lookup.plan, end)
        positions = lookup.stream.positions
        kept = kept_in_the_end(plan)[:end]
        kept[:local] = False
        compute = ~kept
        compute[:local] = False
        spans = spans_of(kept)
        load = Load(
            request_id=request.request_id,
            namespace=lookup.namespace,
            pieces=tuple(within(self.reuse.catalogue.pieces(plan), spans)),
            kept=spans,
            compute=spans_of(compute),
            token_ids=np.asarray(request.all_token_ids[:end], np.int64),
            positions=None if positions is None else positions[:, :end],
            block_ids=tuple(block_ids),
        )
        self._loads.append(load)
        approximate = plan.approximate[:end] & kept
        if approximate.any() and lookup.apart is None:
            lookup.approximate_from = int(np.flatnonzero(approximate)[0])
            lookup.apart = compat.SetApart(request, lookup.approximate_from // self._block_size)
        lookup.gaps = int(compute.sum())
        compat.count_cached(request, local, external - lookup.gaps)
        exact = local
        if lookup.used is not None:
            # A preempted request finds its own blocks, which may be of its first load.
            reused = lookup.used.reused[:local]
            exact = int(np.argmax(reused)) if reused.any() else local
            approximate[:local] = reused
        lookup.loading = True
        lookup.local = local
        lookup.used = plan
        lookup.provenance = Provenance(
            exact=exact + int((kept & ~approximate)[local:].sum()),
            reused=int(approximate.sum()),
            donors=plan.donors,
        )

    # -- a step -----------------------------------------------------------------------------

    def orders(
        self,
        scheduled: Mapping[str, int],
        request_of: Callable[[str], Any],
        blocks_of: Callable[[str], list[int]],
    ) -> Orders:
        """What the workers shall do in this step.

        Args:
            scheduled: tokens that vLLM computes in it, by request.
            request_of: vLLM's request of an id.
            blocks_of: the blocks that it has now.
        """
        idle = not (self._lookups or self._loads or self._saves or self.reuse.busy)
        early = self._bursts.stored(scheduled, request_of, blocks_of, self._saving)
        orders = Orders(self._loads, self._saves, *self.reuse.orders(), early=early)
        self._loads, self._saves = [], []
        if self.audits is not None:
            self.audits.give_way(self._lookups, request_of, sum(scheduled.values()))
            self.audits.order(orders, idle)
        return orders

    @property
    def busy(self) -> bool:
        """Whether workers have something to do even if no request runs."""
        audits = self.audits is not None and self.audits.busy
        return bool(self._loads or self._saves or self.reuse.busy or audits)

    def reported(self, report: WorkerReport, requests: Any) -> None:
        """Take up what the workers did.

        Args:
            requests: finds vLLM's request by its id; None if it is over.
        """
        if report.obstacle is not None:
            self._off(report.obstacle)
        self.reuse.reported(report.kv)
        if report.audit is not None and self.audits is not None:
            self.audits.reported(report.audit)
        for request_id, reason in report.failed.items():
            self._failed(request_id, reason, requests(request_id))
        self._heard.set()

    def _off(self, obstacle: str) -> None:
        """A worker cannot take part; it does not tell what becomes of orders."""
        if self.obstacle is None:
            self.obstacle = obstacle
            logger.warning("KVShare is off: %s", obstacle)
            self._bursts.end()
        for node_id in self.reuse.saving():
            self.reuse.forget(node_id)

    def _failed(self, request_id: str, reason: str, request: Any) -> None:
        lookup = self._lookups.get(request_id)
        if lookup is None:
            return
        lookup.declined = lookup.fallback = reason
        lookup.plan = None
        lookup.used = None
        lookup.gaps = 0
        lookup.provenance = Provenance()
        lookup.local = None
        lookup.approximate_from = None
        if request is not None and lookup.apart is not None:
            lookup.apart.undo(request)
        lookup.apart = None

    def loaded(self, request_id: str) -> None:
        """A load is over, well or not."""
        if (lookup := self._lookups.get(request_id)) is not None:
            lookup.loading = False

    def finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any]]:
        """A request is over: whether its blocks are held until it is stored, and what it was."""
        lookup = self._lookups.pop(request.request_id, None)
        if lookup is None:
            return False, {}
        if lookup.future is not None:
            lookup.future.cancel()
        outcome, gaps = lookup.outcome(request.num_prompt_tokens)
        count_use(self.counters, outcome)
        use = summary(outcome, gaps)
        # The last token's KV is not computed any more.
        length = min(request.num_computed_tokens, request.num_tokens - 1)
        if (
            lookup.loading
            or self.obstacle is not None
            or not request.num_prompt_tokens <= length <= len(block_ids) * self._block_size
        ):
            return False, {"kvshare": use}
        save = self._saving.keep(request, lookup, length, block_ids)
        audits = self.audits
        drawn = audits is not None and audits.draw(request, lookup, length, block_ids, save)
        if save is not None:
            self._saves.append(replace(save, held=drawn))
        audit = {"audit": True} if drawn else {}
        return save is not None or drawn, {"kvshare": {**use, **audit}}

    def _text(self, keys: np.ndarray) -> str:
        words = keys[keys < MEDIA_BIT].astype(np.int64).tolist()
        return str(self.tokenizer.decode(words, skip_special_tokens=True))

    def close(self) -> None:
        self._heard.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.reuse.close()
        if self.audits is not None:
            self.audits.close()
