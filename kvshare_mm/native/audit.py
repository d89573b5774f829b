"""Audits: requests that reused KV approximately are computed in full afterwards, and compared.

What a request's logits were is kept while it decodes. When nobody asks for anything, the engine's
thread computes the prompt and the answer that was given, chunk by chunk, in a slot that nobody
uses; whoever asks meanwhile is served before the next layer. What it took is thrown away for that,
and computed again later.
"""

from __future__ import annotations

import logging
import random
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kvshare_mm.attention import GivenUp, TailAttention
from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.inputs import fitting
from kvshare_mm.native.media import PromptMedia
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.request import RequestSpec
from kvshare_mm.reuse.audits import (
    BUCKETS,
    CHUNK,
    STEPS,
    Compared,
    Divergence,
    changed_facts,
    compared,
    drawn,
    learn,
)
from kvshare_mm.reuse.calibration import Calibration
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.plan import Promise, ReusePlan

logger = logging.getLogger(__name__)

# Audits that wait, and what the logits kept for them take at most.
_MAX_WAITING, _MAX_BYTES = 16, 256 << 20


@dataclass(eq=False, slots=True)
class Audit:
    """A request that is to be audited, and how far that is.

    Attributes:
        answer: its tokens, as they come.
        logits: ``[vocab_size]`` each, what its first tokens were chosen from.
        node_id: what it was stored as; None: it was not, or is not yet.
        slot: where it is computed; -1: nowhere.
        done: so many positions were.
        compared: the tokens of the answer.
        attention: ``[P]`` float32, where the prompt's last position looked.
    """

    spec: RequestSpec
    plan: ReusePlan
    promise: Promise
    answer: list[int]
    logits: list[torch.Tensor] = field(default_factory=list)
    node_id: str | None = None
    slot: int = -1
    done: int = 0
    compared: list[Compared] = field(default_factory=list)
    attention: np.ndarray | None = None

    def keep(self, logits: torch.Tensor) -> None:
        """Remember what the next token (``[vocab_size]``) was chosen from."""
        if len(self.logits) < STEPS:
            self.logits.append(logits.detach().to("cpu", copy=True))

    @property
    def num_bytes(self) -> int:
        return sum(row.nbytes for row in self.logits)

    def begin(self, slot: int) -> None:
        """Start from the beginning, in a slot."""
        self.slot, self.done = slot, 0
        self.compared.clear()

    @property
    def length(self) -> int:
        """Positions to compute: all that the node of the request holds."""
        return len(self.spec.stream) + len(self.answer) - 1


class Auditor:
    """Draws requests, and computes them in full when nothing else is to do.

    Not thread-safe: the engine's thread has it; others read its counters and sizes.

    Args:
        runner: computes them.
        calibration: learns from them.
        share: of the requests that reuse approximately; of the first, more (see `drawn`).
        budget: tokens that are computed a second, at most.
        tokenizer: tells numbers and names; None: no facts are compared.
        encoder: of a multimodal model, or None.
        seed: of the draw.
    """

    def __init__(
        self,
        runner: SlotRunner,
        calibration: Calibration,
        share: float,
        budget: float,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoder: MediaEncoder | None = None,
        seed: int = 0,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.results: deque[Divergence] = deque(maxlen=64)
        self.calibration = calibration
        self._runner = runner
        self._share = share
        self._budget = budget
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._random = random.Random(seed)
        self._waiting: deque[Audit] = deque()
        self._not_before = 0.0
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    # -- a request --------------------------------------------------------------------------

    def draw(self, spec: RequestSpec, plan: ReusePlan, answer: list[int]) -> Audit | None:
        """The audit of a request that begins, if it gets one.

        Args:
            answer: its tokens, as they come.
        """
        known = self.calibration.audits(spec.namespace)
        promise = drawn(plan, self._share, self._random, known)
        return None if promise is None else Audit(spec, plan, promise, answer)

    def add(self, audit: Audit) -> None:
        """A request is over; it will be audited, unless too many wait already."""
        self._waiting.append(audit)
        while (
            len(self._waiting) > _MAX_WAITING
            or sum(waiting.num_bytes for waiting in self._waiting) > _MAX_BYTES
        ):
            self._end("dropped")

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def wait_s(self) -> float | None:
        """Seconds until it may go on; None: there is nothing to do."""
        return max(0.0, self._not_before - time.perf_counter()) if self._waiting else None

    def taken(self, slot: int) -> None:
        """Somebody else computes in a slot now."""
        for audit in self._waiting:
            if audit.slot == slot:
                audit.slot = -1

    # -- in the background ------------------------------------------------------------------

    def work(self, slot: int, given_up: Callable[[], bool]) -> Audit | None:
        """Compute one chunk.

        Args:
            slot: one that nobody uses.
            given_up: asked before every layer; true ends it.

        Returns:
            The audit, once it is over: its node can be healed with what is in the slot.
        """
        audit = self._waiting[0]
        begun = time.perf_counter()
        try:
            if audit.slot != slot:
                audit.begin(slot)
            if not self._has_features(audit):
                self._end("no_features")
                return None
            before = audit.done
            self._advance(audit, given_up)
            over = audit.done == audit.length
            if over:
                self._learn(audit)
        except GivenUp:
            self.counters["yielded"] += 1
            return None
        except Exception:
            # An audit is nobody's request.
            logger.exception("an audit failed")
            self._end("failed")
            return None
        self._not_before = begun + (audit.done - before) / self._budget
        return audit if over else None

    def remove(self, audit: Audit) -> None:
        """What is over does not wait any more."""
        self._waiting.remove(audit)

    def _end(self, why: str) -> None:
        self._waiting.popleft()
        self.counters[why] += 1

    def _has_features(self, audit: Audit) -> bool:
        """The encoders do not run for audits: they cannot be given up."""
        spec, encoder = audit.spec, self._encoder
        return encoder is None or all(
            encoder.knows(item, spec.namespace) for item in spec.stream.items
        )

    def _advance(self, audit: Audit, given_up: Callable[[], bool]) -> None:
        """One chunk of an audit. Raises GivenUp."""
        stream = audit.spec.stream
        ids = np.concatenate((stream.token_ids, np.array(audit.answer[:-1], np.int64)))
        # A chunk ends with the prompt: where its last position looks is kept with the node.
        limit = len(stream) if audit.done < len(stream) else len(ids)
        media = PromptMedia(self._encoder, stream, audit.spec.namespace, True, False)
        left = np.arange(audit.done, limit)
        index = left[: fitting(left, CHUNK, media.whole)]
        ahead = index[-1] + 1 - len(stream)  # tokens of the answer that were computed with it
        tail = TailAttention() if ahead == 0 else None
        inputs = media.inputs(index)
        if inputs is not None:
            inputs = replace(inputs, positions=stream.positions_to(len(ids)))
        keep = 1 if ahead <= 0 else len(index)
        logits = self._runner.forward(audit.slot, ids, index, keep, given_up, tail, inputs)
        if ahead < 0:
            logits[0, 0].item()  # a GPU has done it then, and gets no more than this at once
            audit.done = int(index[-1]) + 1
            return
        found = []
        for full, served in zip(logits, audit.logits[ahead + 1 - keep :], strict=False):
            if given_up():
                raise GivenUp
            found.append(compared(full.cpu(), served))
        audit.compared += found
        audit.done = int(index[-1]) + 1
        if tail is not None:
            audit.attention = tail.mass

    def _learn(self, audit: Audit) -> None:
        spec, promise = audit.spec, audit.promise
        facts = changed_facts(self._tokenizer, audit.plan, spec.stream.token_ids)
        found = Divergence.of(audit.compared, facts, promise.asked)
        self.results.append(found)
        self._buckets[bisect_left(BUCKETS, found.value)] += 1
        self._sum += found.value
        self.counters[learn(self.calibration, spec.namespace, promise, found)] += 1

    def heal(self, audit: Audit, donors: DonorPool) -> None:
        """Make the node of an audit that is over exact, and keep what was learned; from any
        thread, while nobody else has its slot."""
        try:
            if audit.node_id is not None:
                donors.heal(audit.node_id, *self._runner.slot_kv(audit.slot), audit.attention)
            self.calibration.save()
        except Exception:
            # A cache problem is nobody's problem.
            donors.counters["heal_failed"] += 1
            logger.exception("could not heal %s", audit.node_id)

    @property
    def stats(self) -> dict[str, Any]:
        """What was found since the start: audits by what became of them, and their divergence."""
        return {
            "results": dict(self.counters),
            "waiting": len(self._waiting),
            "divergence": {"bounds": BUCKETS, "counts": list(self._buckets), "sum": self._sum},
        }
