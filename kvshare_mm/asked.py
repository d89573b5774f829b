"""What a call of the Python API asks for: two objects, single fields of them by name, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypedDict

from kvshare_mm.config import RequestOptions, Reuse
from kvshare_mm.errors import InvalidRequestError, nearest
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.tools import Tools


class Given(TypedDict, total=False):
    """The fields of `SamplingParams` and `RequestOptions`, by name; and the tools of a chat, as
    OpenAI's API has them."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: str | list[str] | tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None

    reuse: Reuse | None
    repair: str | None
    cache_salt: str | None
    store: bool
    max_divergence: float | None
    tenant: str

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None


class Asked(NamedTuple):
    """How a request is decoded, what it may reuse, and what it offers to be called."""

    params: SamplingParams
    options: RequestOptions
    tools: Tools | None = None


_PARAMS = {f.name for f in fields(SamplingParams)}
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_OPTIONS = {f.name for f in fields(RequestOptions)}


def asked_for(
    params: SamplingParams | None, options: RequestOptions | None, given: Mapping[str, Any]
) -> Asked:
    """What a call asks for: fields that are named go before those of the two objects.

    Raises:
        InvalidRequestError: a name that neither has, or a value that is not allowed.
    """
    params = SamplingParams() if params is None else params
    options = RequestOptions() if options is None else options
    if not isinstance(params, SamplingParams) or not isinstance(options, RequestOptions):
        raise InvalidRequestError("params are SamplingParams, options are RequestOptions")
    for name in given.keys() - _PARAMS - _OPTIONS - {*_TOOLS}:
        hint = nearest(name, _PARAMS | _OPTIONS | {*_TOOLS})
        raise InvalidRequestError(f"a request has no option {name}{hint}", name)
    return Asked(
        replace(params, **{k: v for k, v in given.items() if k in _PARAMS}),
        replace(options, **{k: v for k, v in given.items() if k in _OPTIONS}),
        Tools.of(*(given.get(name) for name in _TOOLS)),
    )
