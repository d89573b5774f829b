"""Answers in OpenAI's shape."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvshare_mm.apps.server.errors import clean
from kvshare_mm.outputs import RequestOutput, TokenLogprob, ToolCall

# What became of a request's prompt, in its scope's state.
PROMPT_TOKENS = "prompt_tokens"


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of one request; `outputs` by prompt and choice, each prompt counted once."""
    prompt, origin = prompt_tokens(outputs)
    cached = origin["exact"] + origin["reused"]
    completion = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def prompt_tokens(outputs: Sequence[RequestOutput]) -> tuple[int, dict[str, int]]:
    """Prompt tokens of one request, each prompt counted once, and how many of them came how."""
    prompts = {output.prompt_token_ids: output.provenance for output in reversed(outputs)}
    kinds = ("exact", "reused", "recomputed")
    return sum(map(len, prompts)), {
        kind: sum(getattr(used, kind) for used in prompts.values()) for kind in kinds
    }


def provenance(outputs: Sequence[RequestOutput], spans: bool) -> dict[str, Any]:
    """The field `kvshare`: where the first choice's KV came from, and each other's if several."""
    first = _one(outputs[0], spans)
    if len(outputs) > 1:
        first["choices"] = [_one(output, spans) for output in outputs]
    return first


def _one(output: RequestOutput, spans: bool) -> dict[str, Any]:
    told = asdict(output.provenance)
    if not spans:
        del told["spans"]
    m = output.metrics
    told["seconds"] = {
        "queue": m.queue,
        "lookup": m.lookup,
        "plan": m.plan,
        "edit": m.edit,
        "prefill": m.prefill,
        "ttft": m.ttft,
        "total": m.total,
    }
    return told


def tool_call(call: ToolCall) -> dict[str, Any]:
    """A call of a tool, with a new id."""
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def finish_reason(reason: str | None, calls: bool) -> str | None:
    """Why an answer ended; that it made calls, unless it was cut."""
    return "tool_calls" if calls and reason == "stop" else reason


def chat_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Any) -> dict[str, Any]:
    """Log probabilities as the chat API gives them."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text = clean(tokenizer.decode([token_id]))
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    content = [
        {**one(x.token_id, x.logprob), "top_logprobs": [one(*top) for top in x.top]}
        for x in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], tokenizer: Any, offset: int
) -> dict[str, Any]:
    """Log probabilities as the completions API gives them; `offset` is where their text begins."""
    tokens, offsets = [], []
    for x in logprobs:
        tokens.append(clean(tokenizer.decode([x.token_id])))
        offsets.append(offset)
        offset += len(tokens[-1])
    tops = [
        {clean(tokenizer.decode([t])): _finite(p) for t, p in x.top} if x.top else None
        for x in logprobs
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(x.logprob) for x in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # OpenAI's word for minus infinity, which JSON does not have
