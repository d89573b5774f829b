"""One request on its way through the engine."""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvshare_mm.config import Reuse
from kvshare_mm.native.detokenizer import Detokenizer
from kvshare_mm.native.prefill import PrefillResult, provenance
from kvshare_mm.outputs import (
    FinishReason,
    Provenance,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
    TokenLogprob,
)
from kvshare_mm.reuse.repair import RepairPolicy
from kvshare_mm.sampling import Sampler, SamplingParams
from kvshare_mm.stream import SegmentStream

logger = logging.getLogger(__name__)

Sink = Callable[[StreamChunk | Exception], None]


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What is asked for.

    Attributes:
        stream: the prompt.
        text: the prompt in words, for dense search.
        params: how to decode.
        namespace: which donors it may use and become.
        reuse: what may be reused for it.
        policy: repairs for it; None: the engine's.
        store: whether it becomes a donor.
        tenant: whose it is: tenants that wait get equal shares of the engine.
        cache_salt, repair: what `namespace` and `policy` were made from, in the user's words.
    """

    stream: SegmentStream
    text: str
    params: SamplingParams
    namespace: str
    reuse: Reuse = "similar"
    policy: RepairPolicy | None = None
    store: bool = True
    tenant: str = ""
    cache_salt: str = ""
    repair: str | None = None


@dataclass(eq=False, slots=True)
class Request:
    """A request's state. Only the engine's thread touches it, except for `cancelled`.

    Attributes:
        after: number of the save that has to be done before it starts, so that it finds what was
            answered before it was asked.
    """

    spec: RequestSpec
    sink: Sink
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    submitted: float = field(default_factory=time.perf_counter)
    after: int = 0
    similar: tuple[str, ...] = ()
    cancelled: bool = False
    slot: int = -1
    admitted: float = 0.0
    prefill: PrefillResult | None = None
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    sampler: Sampler | None = None
    detokenizer: Detokenizer | None = None

    @property
    def num_cached(self) -> int:
        """Positions whose KV is in the slot: the prompt and all answer tokens but the last."""
        return len(self.spec.stream) + max(0, len(self.token_ids) - 1)

    def begin(self, slot: int, tokenizer: Any, device: torch.device) -> None:
        self.slot = slot
        self.admitted = time.perf_counter()
        self.sampler = Sampler(self.spec.params, device)
        self.detokenizer = Detokenizer(tokenizer, self.spec.params.stop)

    def emit(self, chunk: StreamChunk | Exception) -> None:
        """Hand a chunk, or the error that ends the request, to the sink.

        A sink that fails has nobody behind it any more: the request is cancelled, the engine lives.
        """
        try:
            self.sink(chunk)
        except Exception:
            logger.exception("the sink of %s failed", self.request_id)
            self.cancelled = True

    def accept(
        self, logits: torch.Tensor, eos: frozenset[int], max_tokens: int
    ) -> FinishReason | None:
        """Take the next token; says why the request is over, if it is.

        Args:
            logits: ``[vocab_size]``.
            eos: tokens that end an answer.
            max_tokens: longest answer that the context allows.
        """
        assert self.sampler is not None and self.detokenizer is not None
        params = self.spec.params
        token, logprob = self.sampler.sample(logits)
        self.token_ids.append(token)
        self.times.append(time.perf_counter())
        logprobs = () if logprob is None else (logprob,)
        self.logprobs.extend(logprobs)
        if token in eos and not params.ignore_eos:
            return "stop"
        text = self.detokenizer.add(token)
        if self.detokenizer.stopped:
            if text:
                self.emit(StreamChunk(text, (token,), logprobs=logprobs))
            return "stop"
        if len(self.token_ids) >= min(params.max_tokens or max_tokens, max_tokens):
            if text:
                self.emit(StreamChunk(text, (token,), logprobs=logprobs))
            return "length"
        self.emit(StreamChunk(text, (token,), logprobs=logprobs))
        return None

    def finish(self, reason: FinishReason) -> RequestOutput:
        """The output; also sent to the sink as the last chunk."""
        rest = self.detokenizer.finish() if self.detokenizer else ""
        done = time.perf_counter()
        times, result = self.times, self.prefill
        metrics = RequestMetrics(
            queue=(self.admitted or done) - self.submitted,
            lookup=result.lookup if result else 0.0,
            plan=result.planning if result else 0.0,
            edit=result.edit if result else 0.0,
            encode=result.encode if result else 0.0,
            prefill=result.compute if result else 0.0,
            ttft=times[0] - self.submitted if times else 0.0,
            token_times=tuple(b - a for a, b in itertools.pairwise(times)),
            total=done - self.submitted,
        )
        output = RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=tuple(self.spec.stream.token_ids.tolist()),
            text=self.detokenizer.text if self.detokenizer else "",
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            provenance=provenance(result) if result else Provenance(),
            metrics=metrics,
            logprobs=tuple(self.logprobs) if self.spec.params.logprobs is not None else None,
        )
        self.emit(StreamChunk(rest, output=output))
        return output
