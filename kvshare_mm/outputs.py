"""What a caller gets back: the answer, where its prompt's KV came from, and where the time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kvshare_mm.stream import MediaItem, Segment

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt positions ``[start, end)`` and how their KV came to be.

    Attributes:
        kind: "exact" (a donor's prefix), "reused" (edited from a donor) or "recomputed".
        donor: id of the donor, or None for computed positions.
    """

    start: int
    end: int
    kind: Literal["exact", "reused", "recomputed"]
    donor: str | None = None


@dataclass(frozen=True, slots=True)
class MediaUse:
    """A picture or clip of the prompt, and what it cost.

    Attributes:
        modality: "image", "audio" or "video".
        start, end: its positions ``[start, end)``.
        content_hash: 16 hex digits; equal for what is the same to the model.
        label: its sizes, in words.
        source: "kv" (its KV was reused, its content not looked at), "features" (known to the
            encoder) or "encoder" (the encoder ran).
        notes: what was done to it that its sender may not expect.
    """

    modality: str
    start: int
    end: int
    content_hash: str
    label: str
    source: Literal["kv", "features", "encoder"]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, segment: Segment, item: MediaItem, source: Literal["kv", "features", "encoder"]
    ) -> MediaUse:
        """What became of an `item` that stands at `segment`."""
        return cls(
            segment.modality.value,
            segment.start,
            segment.end,
            item.digest[:16],
            item.label,
            source,
            item.notes,
        )


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the prompt's KV came from; ``exact + reused + recomputed`` is its length.

    Attributes:
        exact: tokens reused from an identical prefix.
        reused: tokens whose KV was edited from a similar request.
        recomputed: tokens that the model computed.
        donors: ids of the donors used, the one that gave most first.
        similarity: share of the prompt that was found in donors, 0 to 1.
        declined: why nothing (more) was reused, or None.
        fallback: why a planned reuse was given up and the prompt computed in full, or None.
        spans: the prompt, tiled.
        media: its pictures and clips, in order.
        expected_divergence: nats that the answer stays below in 95% of the cases (the larger of the
            first token's KL and the mean along the answer), as far as that is known; None: nothing
            approximate was reused, or vLLM runs the model.
        shared: tokens of `exact` and `reused` from donors that another replica made.
    """

    exact: int = 0
    reused: int = 0
    recomputed: int = 0
    donors: tuple[str, ...] = ()
    similarity: float = 0.0
    declined: str | None = None
    fallback: str | None = None
    spans: tuple[Span, ...] = field(default=(), repr=False)
    media: tuple[MediaUse, ...] = ()
    expected_divergence: float | None = None
    shared: int = 0


def count_use(counters: Counter[str], use: Provenance) -> None:
    """Count a request and where its prompt's KV came from."""
    counters["requests"] += 1
    counters["prompt_tokens_exact"] += use.exact
    counters["prompt_tokens_reused"] += use.reused
    counters["prompt_tokens_shared"] += use.shared
    counters["prompt_tokens_recomputed"] += use.recomputed
    if use.declined:
        counters[f"declined_{use.declined}"] += 1
    if use.fallback:
        counters[f"fallback_{use.fallback}"] += 1
    for medium in use.media:
        counters[f"media_{medium.source}"] += 1


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds spent on a request.

    Attributes:
        queue: waiting for a slot.
        lookup: finding candidate donors.
        plan: alignment, planning and choosing repairs.
        edit: reading donor KV and writing it into the slot.
        encode: the encoders of pictures and sound, or reading what they made before.
        prefill: the model's forward over the positions to compute, those to repair among them.
        ttft: from submission to the first token.
        token_times: ``[num_output_tokens - 1]`` time between tokens.
        total: from submission to the last token.
    """

    queue: float = 0.0
    lookup: float = 0.0
    plan: float = 0.0
    edit: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    ttft: float = 0.0
    token_times: tuple[float, ...] = field(default=(), repr=False)
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's log probability, with the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: of the function.
        arguments: a JSON object.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: unique id.
        prompt_token_ids: the prompt as tokens.
        text: the answer as the model wrote it, calls of tools included; stop strings are cut off.
        token_ids: the answer's tokens, end-of-sequence included.
        finish_reason: "stop" (end token or stop string), "length" or "abort".
        logprobs: one entry per token if they were asked for.
        tool_calls: of those offered, the calls that the answer makes.
        content: the answer without its calls.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason
    provenance: Provenance
    metrics: RequestMetrics
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    content: str = field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """New text of a running request; the last chunk carries the whole `output`."""

    text: str
    token_ids: tuple[int, ...] = ()
    output: RequestOutput | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
