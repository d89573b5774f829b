"""A request: what it asks for, with the user's options as given, and what has come of it so far."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvshare_mm.config import RequestOptions
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.grammar import Grammar
from kvshare_mm.outputs import (
    FinishReason,
    Provenance,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
    TokenLogprob,
    ToolCall,
)
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import SegmentStream
from kvshare_mm.tools import CallReader

Sink = Callable[[StreamChunk | Exception], None]


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What is asked for.

    Attributes:
        stream: the prompt.
        text: the prompt in words, for dense search.
        params: how to decode.
        namespace: which donors it may use and become.
        options: how it reuses.
        grammar: of the answer; None: any, or vLLM's matter.
        calls: makes what reads calls of tools from the answer; None: it has none.
    """

    stream: SegmentStream
    text: str
    params: SamplingParams
    namespace: str
    options: RequestOptions = field(default_factory=RequestOptions)
    grammar: Grammar | None = None
    calls: Callable[[], CallReader] | None = None

    def check(self, max_model_len: int) -> None:
        """Raises InvalidRequestError: empty prompt, or one longer than the context."""
        if (n := len(self.stream)) == 0:
            raise InvalidRequestError("the prompt is empty", "prompt")
        if n >= max_model_len:
            raise InvalidRequestError(
                f"the prompt has {n} tokens and the context holds {max_model_len}, "
                "answer included; shorten it or raise max_model_len",
                "prompt",
            )


@dataclass(eq=False, slots=True)
class Request:
    """A request that an engine runs, and its answer so far."""

    spec: RequestSpec
    sink: Sink
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    submitted: float = field(default_factory=time.perf_counter)
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def output(
        self, text: str, reason: FinishReason, provenance: Provenance, **seconds: Any
    ) -> RequestOutput:
        """The whole output.

        Args:
            seconds: of `RequestMetrics`, what only the engine knows.
        """
        times = self.times
        told: list[str | ToolCall] = [text]
        if self.spec.calls is not None:
            reader = self.spec.calls()
            told = [*reader.feed(text), *reader.end()]
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=tuple(self.spec.stream.token_ids.tolist()),
            text=text,
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            provenance=provenance,
            metrics=RequestMetrics(
                ttft=times[0] - self.submitted if times else 0.0,
                token_times=tuple(b - a for a, b in itertools.pairwise(times)),
                total=time.perf_counter() - self.submitted,
                **seconds,
            ),
            logprobs=tuple(self.logprobs) if self.spec.params.logprobs is not None else None,
            tool_calls=tuple(each for each in told if isinstance(each, ToolCall)),
            content="".join(each for each in told if isinstance(each, str)),
        )
