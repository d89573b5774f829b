"""Prefill with reuse: plan, edit, repair, compute. In chunks for the engine, at once for others."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from kvshare_mm.attention import TailAttention
from kvshare_mm.config import Reuse
from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.inputs import fitting
from kvshare_mm.native.media import PromptMedia
from kvshare_mm.native.slots import Chunk, ModelRunner, SlotRunner
from kvshare_mm.native.states import StateRunner
from kvshare_mm.outputs import MediaUse, Provenance, Span
from kvshare_mm.reads import Heads, Reads
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.plan import Decline, PlannerOptions, ReusePlan
from kvshare_mm.reuse.repair import RepairPolicy
from kvshare_mm.reuse.shared import MoreTime
from kvshare_mm.stream import SegmentStream

logger = logging.getLogger(__name__)

# Why a donor's KV cannot be had any more.
_LOST = ("corrupt", "evicted", "newer_format")


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """A filled slot.

    Attributes:
        logits: ``[vocab_size]`` of the last prompt position.
        plan: what was reused in the end.
        attention: ``[num_tokens]`` float32, how much the last position looked at each, or None if
            the runner cannot tell.
        fallback: why a planned reuse was given up, or None.
        lookup, planning, edit, encode, compute: seconds.
        media: the prompt's pictures and clips.
        rope_delta: rotary position minus index of the answer's tokens.
        likely: ``[A]`` int64, what may be answered, from what a donor was; empty: nothing is known.
        reads: ``[R, 2]`` int32, computed positions and what they read far before them.
        shared: ids of the plan's donors that another replica made.
    """

    logits: torch.Tensor
    plan: ReusePlan
    attention: np.ndarray | None
    fallback: str | None
    lookup: float
    planning: float
    edit: float
    compute: float
    encode: float = 0.0
    media: tuple[MediaUse, ...] = ()
    rope_delta: int = 0
    likely: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    reads: np.ndarray | None = None
    shared: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class Prefill:
    """A prompt on its way: what is reused is in its slot, the rest is computed in chunks.

    Attributes:
        tail: records where the last position looks; None: nobody needs that.
        reads: records what the computed positions read; None: nobody needs that.
        fallback, lookup, planning, edit, likely, shared: see `PrefillResult`.
        done: so many of the plan's positions are computed.
        seconds: that this took, the media's encoders included.
    """

    runner: ModelRunner
    slot: int
    stream: SegmentStream
    plan: ReusePlan
    media: PromptMedia
    tail: TailAttention | None
    reads: Reads | None
    fallback: str | None
    lookup: float
    planning: float
    edit: float
    likely: np.ndarray
    shared: frozenset[str]
    done: int = 0
    seconds: float = 0.0

    @property
    def context(self) -> int:
        """What the next position to compute has before it."""
        return int(self.plan.compute[self.done])

    @property
    def left(self) -> int:
        """Positions that are still to be computed."""
        return len(self.plan.compute) - self.done

    def advance(self, most: int) -> PrefillResult | None:
        """Compute the next `most` positions, or those that are left; None: some still are."""
        return self.compute(self.next(most))

    def next(self, most: int) -> Chunk:
        """The next positions, see `inputs.fitting`; encodes the media among them."""
        start = time.perf_counter()
        left = self.plan.compute[self.done :]
        here = left[: fitting(left, most, self.media.whole)]
        chunk = Chunk(
            self.slot,
            self.stream.token_ids,
            here,
            self.tail if len(here) == len(left) else None,
            self.media.inputs(here),
            self.reads.add if self.reads is not None else None,
        )
        self.seconds += time.perf_counter() - start
        return chunk

    def compute(self, chunk: Chunk) -> PrefillResult | None:
        """Compute a chunk in a forward of its own; None: it is not the last."""
        start = time.perf_counter()
        logits = self.runner.prefill(
            chunk.slot, chunk.token_ids, chunk.compute, chunk.tail, chunk.media, chunk.reads
        )
        return self.computed(chunk, logits, start)

    def computed(self, chunk: Chunk, logits: torch.Tensor, start: float) -> PrefillResult | None:
        """Take up a chunk that was computed; None: it is not the last.

        Args:
            logits: ``[vocab_size]`` of its last position.
            start: `time.perf_counter` when it was begun.
        """
        self.done += len(chunk.compute)
        is_last = not self.left
        if not is_last:
            logits[0].item()  # a GPU has done it then: who comes now waits for the next at most
        self.seconds += time.perf_counter() - start
        if not is_last:
            return None
        return PrefillResult(
            logits=logits,
            plan=self.plan,
            attention=self.tail.mass if self.tail is not None else None,
            fallback=self.fallback,
            lookup=self.lookup,
            planning=self.planning,
            edit=self.edit,
            compute=self.seconds - self.media.seconds,
            encode=self.media.seconds,
            media=self.media.uses,
            rope_delta=self.stream.rope_delta,
            likely=self.likely,
            reads=self.reads.pairs(self.stream.align_keys) if self.reads is not None else None,
            shared=self.shared,
        )


class Prefiller:
    """Fills slots.

    Args:
        runner: runs the model; reuse needs a `SlotRunner`, of identical beginnings a `StateRunner`.
        donors: where reuse comes from, or None.
        options: when reuse is worth it.
        policy: which kept positions are recomputed.
        encoder: of a multimodal model, or None.
    """

    def __init__(
        self,
        runner: ModelRunner,
        donors: DonorPool | None,
        options: PlannerOptions,
        policy: RepairPolicy,
        encoder: MediaEncoder | None = None,
    ) -> None:
        self._runner = runner
        self._donors = donors
        self._options = options
        self._policy = policy
        self._encoder = encoder
        self._heads: Heads = {}
        if donors is not None and isinstance(runner, SlotRunner):
            self._heads = runner.reading_heads

    def prefill(self, slot: int, stream: SegmentStream, ns: str, **options: Any) -> PrefillResult:
        """Fill `slot` with the KV of a prompt and return its last logits, see `begin`."""
        result = self.begin(slot, stream, ns, **options).advance(len(stream))
        assert result is not None
        return result

    def begin(
        self,
        slot: int,
        stream: SegmentStream,
        ns: str,
        *,
        reuse: Reuse = "similar",
        policy: RepairPolicy | None = None,
        similar: tuple[str, ...] = (),
        store: bool = True,
    ) -> Prefill:
        """Plan a prompt and load what is reused into `slot`; nothing is computed yet.

        Args:
            stream: the prompt.
            ns: its namespace.
            reuse: what may be reused for this request.
            policy: repairs for this request; the default policy if None.
            similar: donors that a dense search found.
            store: keep what the encoders of its media make.
        """
        policy = policy or self._policy
        plan, fallback, lookup, planning = self._plan(stream, ns, reuse, similar, policy)
        start = time.perf_counter()
        media = PromptMedia(self._encoder, stream, ns, reuse != "off", store)
        for attempt in range(2):
            if not plan.runs:
                break
            try:
                self._edit(plan, slot, ns, stream)
                fallback = None
                break
            except KVUnavailableError as error:
                logger.info("donor lost: %s", error)
                fallback = error.reason
                if attempt == 0 and fallback in _LOST:
                    # The pool has forgotten it by now; the others may do.
                    plan = self._plan(stream, ns, reuse, similar, policy)[0]
                    continue
            except Exception:
                # A cache problem is never a request's problem; the slot is computed whole.
                logger.exception("edit failed; computing in full")
                fallback = "edit_error"
            plan = ReusePlan(len(stream), declined=plan.declined, origin=plan.edited_from)
        edit = time.perf_counter() - start
        # Only donors need it; without a pool there will be none.
        tail = TailAttention() if self._donors is not None else None
        reads = Reads(self._heads) if self._heads and store else None
        if isinstance(self._runner, StateRunner):
            tail = None
            if self._donors is not None and store and reuse != "off":
                self._runner.begin(slot, stream.token_ids, plan.num_exact, plan.parted)
        likely = np.empty(0, np.int64)
        shared: frozenset[str] = frozenset()
        if self._donors is not None and self._donors.shared is not None:
            shared = frozenset(plan.donors) & self._donors.shared.taken
        if self._donors is not None and plan.edited_from is not None:
            likely = self._donors.likely_answer(plan, stream.align_keys)
        return Prefill(
            self._runner,
            slot,
            stream,
            plan,
            media,
            tail,
            reads,
            fallback,
            lookup,
            planning,
            edit,
            likely,
            shared,
        )

    def bring(
        self,
        stream: SegmentStream,
        ns: str,
        reuse: Reuse,
        policy: RepairPolicy | None,
        similar: tuple[str, ...],
        more_time: MoreTime,
    ) -> None:
        """Take over what of other replicas' donors a prompt can use, see `SharedDonors.bring`."""
        if self._donors is not None and self._donors.shared is not None and reuse != "off":
            options = self._options.but_exact_only() if reuse == "exact" else self._options
            policy = policy or self._policy
            self._donors.shared.bring(stream, ns, options, policy, similar, more_time)

    def _plan(
        self,
        stream: SegmentStream,
        ns: str,
        reuse: Reuse,
        similar: tuple[str, ...],
        policy: RepairPolicy,
    ) -> tuple[ReusePlan, str | None, float, float]:
        n = len(stream)
        if not isinstance(self._runner, SlotRunner | StateRunner):
            return ReusePlan(n, declined=Decline.UNSUPPORTED_MODEL), None, 0.0, 0.0
        if self._donors is None or reuse == "off":
            return ReusePlan(n, declined=Decline.REUSE_OFF), None, 0.0, 0.0
        options = self._options.but_exact_only() if reuse == "exact" else self._options
        found = self._donors.reuse.find(stream, ns, options, policy, similar)
        failed = "lookup_error" if found.plan.declined is Decline.LOOKUP_ERROR else None
        return found.plan, failed, found.lookup, found.planning

    @torch.inference_mode()
    def save(
        self,
        slot: int,
        stream: SegmentStream,
        ns: str,
        result: PrefillResult,
        answer: Sequence[int] = (),
        text: str = "",
        node_id: str | None = None,
        over: bool = True,
    ) -> str | None:
        """Make a prompt and its answer a donor.

        Args:
            slot: where their KV is.
            result: what the prefill gave.
            answer: tokens whose KV is in the slot as well.
            text: what it shall be found by.
            node_id: what the prompt was stored as already, if it was.
            over: the answer is complete; else it will come, and the prompt is stored before.

        Returns:
            The node's id, or None if it is not stored.
        """
        assert self._donors is not None and isinstance(self._runner, SlotRunner | StateRunner)
        keys = np.concatenate((stream.align_keys, np.array(answer, np.uint64)))
        if isinstance(self._runner, StateRunner):
            for length, state in self._runner.states(slot, over):
                self._donors.states.put(ns, keys[:length], state)
        if node_id is not None:
            kv, positions = self._runner.slot_kv(slot), stream.positions_to(len(keys))
            if self._donors.extend(node_id, keys, *kv, positions):
                return node_id
        return self._donors.save(
            keys,
            ns,
            result.plan,
            *self._runner.slot_kv(slot),
            text,
            result.attention,
            stream.positions_to(len(keys)),
            stream.media,
            over,
            result.reads,
        )

    def _edit(self, plan: ReusePlan, slot: int, ns: str, stream: SegmentStream) -> None:
        assert self._donors is not None and isinstance(self._runner, SlotRunner | StateRunner)
        if isinstance(self._runner, SlotRunner):
            self._donors.load(plan, ns, *self._runner.slot_kv(slot), stream.positions)
            return
        k, v = self._runner.empty_kv(plan.num_exact)
        self._donors.load(plan, ns, k, v, stream.positions)
        state = None
        if self._runner.layout.states:
            state = self._donors.states.get(ns, stream.align_keys[: plan.num_exact])
        self._runner.resume(slot, k, v, state)


def provenance(result: PrefillResult) -> Provenance:
    """What a caller is told of a prefill."""
    plan = result.plan
    kinds = np.zeros(plan.num_tokens, np.int8)
    owner = np.full(plan.num_tokens, -1)
    names = {donor: i for i, donor in enumerate(plan.donors)}
    for run in plan.runs:
        kinds[run.start : run.end] = 1 if run.exact else 2
        owner[run.start : run.end] = names[run.donor]
    kinds[plan.repair] = 0
    owner[plan.repair] = -1
    edges = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(owner) != 0)) + 1
    bounds = [0, *edges.tolist(), plan.num_tokens]
    labels: tuple[Literal["recomputed", "exact", "reused"], ...] = ("recomputed", "exact", "reused")
    spans = tuple(
        Span(a, b, labels[kinds[a]], plan.donors[owner[a]] if owner[a] >= 0 else None)
        for a, b in itertools.pairwise(bounds)
    )
    return Provenance(
        exact=plan.num_exact,
        reused=plan.num_reused,
        recomputed=plan.num_computed,
        donors=plan.donors,
        similarity=float(plan.kept.mean()),
        declined=plan.declined,
        fallback=result.fallback,
        spans=spans,
        media=result.media,
        expected_divergence=plan.promise.expected if plan.promise else None,
        shared=int(np.isin(owner, [names[donor] for donor in result.shared]).sum()),
    )
