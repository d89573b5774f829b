"""Answers in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvshare_mm.apps.server.errors import clean
from kvshare_mm.outputs import RequestOutput, TokenLogprob


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of one request; `outputs` by prompt and choice, each prompt counted once."""
    prompts = {output.prompt_token_ids: output for output in reversed(outputs)}
    prompt = sum(map(len, prompts))
    cached = sum(o.provenance.exact + o.provenance.reused for o in prompts.values())
    completion = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
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
