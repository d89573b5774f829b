"""A request on its way through the native engine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvshare_mm.index.ngrams import overlap, sketch
from kvshare_mm.native.audit import Audit
from kvshare_mm.native.detokenizer import Detokenizer
from kvshare_mm.native.drafts import Drafter
from kvshare_mm.native.prefill import Prefill, PrefillResult, provenance
from kvshare_mm.outputs import FinishReason, Provenance, StreamChunk
from kvshare_mm.request import Request
from kvshare_mm.sampling import Sampler

logger = logging.getLogger(__name__)

# Share of n-grams in common from which on two prompts are alike.
_ALIKE = 0.25


@dataclass(eq=False, slots=True)
class SlotRequest(Request):
    """A request in its slot. Only the engine's thread touches it, except for `cancelled`.

    Attributes:
        after: number of the save that has to be done before it starts, so that it finds what was
            computed before.
        held: `time.perf_counter` from when it waits for that.
        help_until: `time.perf_counter` until when it waits for donors of other replicas.
        sketch: of its prompt, once it was compared with another's.
        overlap: share of its prompt that a donor is expected to have.
        overtaken: tokens computed for others of its tenant that came later and started before it;
            each counts as a share of its own at least.
        node_id: what its prompt was stored as while it is answered; None: it was not, or not yet.
        longest: tokens that its answer may have.
        computing: its prompt while it is prefilled; then that is `prefill`.
        audit: of a request that is to be audited.
        drafter: of its answer, where the runner takes drafts.
        draft: tokens that may come behind the last one, in this decode step.
    """

    after: int = 0
    held: float = 0.0
    help_until: float = 0.0
    sketch: np.ndarray | None = None
    overlap: float = 0.0
    overtaken: float = 0.0
    node_id: str | None = None
    similar: tuple[str, ...] = ()
    cancelled: bool = False
    slot: int = -1
    longest: int = 0
    admitted: float = 0.0
    computing: Prefill | None = None
    prefill: PrefillResult | None = None
    audit: Audit | None = None
    drafter: Drafter | None = None
    draft: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    detokenizer: Detokenizer | None = None

    @property
    def num_cached(self) -> int:
        """Positions whose KV is in the slot: the prompt and all answer tokens but the last."""
        return len(self.spec.stream) + max(0, len(self.token_ids) - 1)

    @property
    def expected_tokens(self) -> float:
        """Of its prompt, those that are to be computed, as far as is known before it starts."""
        saved = self.overlap if self.spec.options.reuse != "exact" else 0.0
        return (1 - saved) * len(self.spec.stream)

    def is_like(self, other: SlotRequest) -> bool:
        """Whether it may find the other as a donor, so much do the two have in common."""
        return self.overlap_with(other) > _ALIKE

    def overlap_with(self, other: SlotRequest) -> float:
        """Share of its prompt's n-grams that are in the other's, 0 to 1; 0: they share nothing."""
        if self.spec.options.reuse == "off" or self.spec.namespace != other.spec.namespace:
            return 0.0
        return overlap(self._sketched(), other._sketched())

    def _sketched(self) -> np.ndarray:
        if self.sketch is None:
            self.sketch = sketch(self.spec.stream.align_keys)
        return self.sketch

    @property
    def becomes_donor(self) -> bool:
        """Whether its KV is there and may be stored."""
        asked = self.spec.options
        return asked.store and asked.reuse != "off" and self.prefill is not None

    def begin(self, slot: int, tokenizer: Any, device: torch.device, room: int) -> None:
        """Start in a slot that has `room` positions."""
        self.slot = slot
        self.admitted = time.perf_counter()
        spec = self.spec
        room -= len(spec.stream)
        self.longest = min(spec.params.max_tokens or room, room)
        self.sampler = Sampler(spec.params, device, spec.stream.token_ids, spec.grammar)
        self.detokenizer = Detokenizer(tokenizer, spec.params.stop)

    def emit(self, chunk: StreamChunk | Exception) -> None:
        """Hand a chunk, or the error that ends the request, to the sink.

        A sink that fails has nobody behind it any more: the request is cancelled, the engine lives.
        """
        try:
            self.sink(chunk)
        except Exception:
            logger.exception("the sink of %s failed", self.request_id)
            self.cancelled = True

    def accept(self, logits: torch.Tensor, eos: frozenset[int]) -> FinishReason | None:
        """Take the next token; says why the request is over, if it is.

        Args:
            logits: ``[vocab_size]``.
            eos: tokens that end an answer.
        """
        assert self.sampler is not None and self.detokenizer is not None
        token, logprob = self.sampler.sample(logits)
        self.token_ids.append(token)
        self.times.append(time.perf_counter())
        logprobs = () if logprob is None else (logprob,)
        self.logprobs.extend(logprobs)
        if token in eos and not self.spec.params.ignore_eos:
            return "stop"
        text = self.detokenizer.add(token)
        reason: FinishReason | None = None
        if self.detokenizer.stopped or self.sampler.complete:
            reason = "stop"
        elif len(self.token_ids) >= self.longest:
            reason = "length"
        if text or reason is None:
            self.emit(StreamChunk(text, (token,), logprobs=logprobs))
        return reason

    def propose(self, most: int, batch: int) -> None:
        """Make the draft of the next decode step, of so many answers and tokens at most."""
        if self.drafter is not None:
            left = self.longest - len(self.token_ids)
            self.draft = self.drafter.draft(max(0, min(most, left - 1)), batch)

    def finish(self, reason: FinishReason) -> None:
        """Send the output as the last chunk, or what became of it: nobody must wait for ever."""
        try:
            last: StreamChunk | Exception = self._last(reason)
        except Exception as failure:
            logger.exception("the output of %s could not be made", self.request_id)
            last = failure
        self.emit(last)

    def _last(self, reason: FinishReason) -> StreamChunk:
        rest = self.detokenizer.finish() if self.detokenizer else ""
        result = self.prefill
        seconds = {"queue": (self.admitted or time.perf_counter()) - self.submitted}
        if result is not None:
            seconds |= {
                "lookup": result.lookup,
                "plan": result.planning,
                "edit": result.edit,
                "encode": result.encode,
                "prefill": result.compute,
            }
        output = self.output(
            self.detokenizer.text if self.detokenizer else "",
            reason,
            provenance(result) if result else Provenance(),
            **seconds,
        )
        return StreamChunk(rest, output=output)
