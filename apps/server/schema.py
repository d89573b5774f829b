"""Bodies of requests, as OpenAI and vLLM name them.

Fields that would change the answer and are not supported are refused by name, unless they ask for
nothing (`length_penalty: 1`). Fields nobody knows are ignored, as vLLM does.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticUseDefault

from kvshare_mm.apps.server.description import (
    content_is_needed,
    kinds_of_parts,
    limits,
    response_limits,
)
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.config import Reuse, refuse_old_words
from kvshare_mm.sampling import SamplingParams

_NOTHING: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (0,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "prompt_embeds": (),
}


_MAX_PARTS = 10_000
_MAX_TOKENS = 1 << 20


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is the integer 5; also in lists, and in lists of lists."""
    if not isinstance(value, list):
        return _integer(value)
    if len(value) > _MAX_TOKENS:
        return value  # it is refused anyway
    if set(map(type, value)) <= {int, str}:
        return value  # most lists, in a tenth of the time
    return [
        [_integer(v) for v in each] if isinstance(each, list) else _integer(each) for each in value
    ]


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
_Whole = Annotated[int, _WHOLE]


def _default_for_null(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


# Clients spell out what they do not set as null: it is then as if it were not there.
_Flag = Annotated[bool, BeforeValidator(_default_for_null, json_schema_input_type=bool | None)]
_Text = Annotated[str, BeforeValidator(_default_for_null, json_schema_input_type=str | None)]


# Of /v1/responses. What is kept for later requests is not: nothing is stored.
_NOTHING_OF_RESPONSES = _NOTHING | {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "background_options": (),
    "include": ([],),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "truncation": ("disabled",),
    "prompt": (),
    "context_management": ([],),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "logprobs": (False,),
    "moderation": (),
    "image": (),
    "access_programs": (),
    # Other routes' names, which would otherwise be ignored.
    "messages": (),
    "max_tokens": (),
    "max_completion_tokens": (),
    "response_format": (),
    "n": (1,),
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=limits)
    nothing: ClassVar[dict[str, tuple[Any, ...]]] = _NOTHING

    model: str | None = None

    def check(self, served: str) -> None:
        """Refuses another model and what is not supported. Raises ApiError."""
        if self.model is not None and self.model != served:
            raise ApiError(
                404, f"there is no model {self.model!r} here, only {served!r}", "model",
                "model_not_found",
            )  # fmt: skip
        for name, value in (self.model_extra or {}).items():
            nothing = self.nothing.get(name)
            if nothing is not None and value is not None and value not in nothing:
                raise ApiError(400, f"{name} is not supported by this server", name, "unsupported")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: _Flag = False


class KVShareField(BaseModel):
    """Our own field `kvshare`: how one request may reuse."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=limits)

    reuse: Reuse | None = None
    repair: str | None = None
    max_divergence: float | None = None
    store: _Flag = True
    spans: _Flag = False

    _words = model_validator(mode="before")(refuse_old_words)


_Ours = Annotated[
    KVShareField, BeforeValidator(_default_for_null, json_schema_input_type=KVShareField | None)
]


class Sampling(_Body):
    """What all routes that generate take."""

    temperature: float | None = Field(None, description="0 is greedy; default 1")
    top_p: float | None = None
    top_k: _Whole | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = Field(None, description="vLLM's; default 1")
    logit_bias: Annotated[dict[str, float], Field(max_length=1_024)] | None = Field(
        None, description="token ids, as strings, and what is added to their logits"
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="vLLM's: one of regex, grammar, choice, json"
    )
    seed: _Whole | None = None
    stop: str | Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: _Flag = False
    stream: bool | None = None
    cache_salt: str | None = Field(None, description="only requests with the same salt share KV")
    kvshare: _Ours = KVShareField()


class _Generation(Sampling):
    max_tokens: _Whole | None = None
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema; the answer always follows the schema"
    )
    n: _Whole | None = Field(None, description="answers to each prompt; default 1")
    stream_options: StreamOptions | None = None

    def params(self, max_tokens: int | None, logprobs: int | None, choice: int) -> SamplingParams:
        """How one choice is decoded. Raises InvalidRequestError."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=_or(self.top_k, 0),
            min_p=_or(self.min_p, 0.0),
            # Choices of one request must differ, and repeat with the same seed.
            seed=None if self.seed is None else self.seed + choice,
            stop=self.stop or (),  # type: ignore[arg-type]
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=_by_token(self.logit_bias or {}),
            response_format=self.response_format,
            structured_outputs=self.structured_outputs,
        )


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow", json_schema_extra=kinds_of_parts)

    type: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", json_schema_extra=content_is_needed)

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=1_024)] | None = None


def _few(messages: Any) -> Any:
    """Refuses more messages and parts than any chat has, before each is looked at."""
    count = 0
    for message in messages if isinstance(messages, list) else ():
        held = (message.get("content"), message.get("output")) if isinstance(message, dict) else ()
        count += 1 + sum(len(each) for each in held if isinstance(each, list))
        if count > _MAX_PARTS:
            raise ValueError(f"more than {_MAX_PARTS} messages and parts of messages")
    return messages


# A body is validated on the thread that answers everybody: none of these lists may be as long as
# a body can be, and the first wrong item is enough.
Messages = Annotated[list[ChatMessage], BeforeValidator(_few)]
TokenIds = Annotated[list[int], Field(max_length=_MAX_TOKENS, fail_fast=True)]
_Prompts = Field(max_length=1_024, fail_fast=True)


class _Tools(BaseModel):
    """What may be called."""

    tools: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required, or the function that must be called"
    )
    parallel_tool_calls: bool | None = None

    @property
    def offered(self) -> dict[str, Any]:
        """These fields as `KVShare.read` takes them."""
        return self.model_dump(include={"tools", "tool_choice", "parallel_tool_calls"})


class ChatBody(_Tools, _Generation):
    messages: Annotated[Messages, Field(min_length=1)]
    max_completion_tokens: _Whole | None = None
    logprobs: bool | None = None
    top_logprobs: _Whole | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
            return None
        return self.top_logprobs or 0


class TextField(BaseModel):
    """The field `text` of /v1/responses."""

    model_config = ConfigDict(strict=True, json_schema_extra=response_limits)

    format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema; the answer always follows the schema"
    )
    verbosity: Literal["medium"] | None = None


class ResponsesBody(_Tools, Sampling):
    model_config = ConfigDict(json_schema_extra=response_limits)
    nothing = _NOTHING_OF_RESPONSES

    input: Annotated[str | list[dict[str, Any]], BeforeValidator(_few)]
    instructions: str | None = Field(None, description="stand before the input, as its system")
    max_output_tokens: _Whole | None = None
    text: TextField | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        None, description="comes back with the answer"
    )
    store: bool | None = Field(None, description="nothing is stored, whatever this says")

    @property
    def form(self) -> dict[str, Any]:
        """What its text must look like."""
        if self.text is None or self.text.format is None:
            return {"type": "text"}
        return self.text.format


class CompletionBody(_Generation):
    prompt: Annotated[
        str | Annotated[list[str], _Prompts] | TokenIds | Annotated[list[TokenIds], _Prompts],
        _WHOLE,
    ]
    logprobs: _Whole | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts. Raises ApiError: none."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ApiError(400, "the prompt is empty", "prompt")
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class TokenizeBody(_Body):
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: _Flag = True
    return_token_strs: _Flag = False


class DetokenizeBody(_Body):
    tokens: Annotated[TokenIds, _WHOLE]


class EmbeddingsBody(_Body):
    input: str | Annotated[list[str], Field(min_length=1, max_length=2_048, fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Whole | None = None


class LookupBody(_Body):
    """A request that is only planned: a chat or a prompt, and whose it would be."""

    messages: Messages | None = None
    prompt: Annotated[str | TokenIds | None, _WHOLE] = None
    tenant: _Text = ""
    cache_salt: str | None = None
    kvshare: _Ours = KVShareField()


class PinBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    ttl_s: float = Field(gt=0, le=10 * 365 * 86400, allow_inf_nan=False)


class ClearBody(BaseModel):
    """What is deleted: a namespace, by its name or by tenant and salt; or everything."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=limits)

    namespace: str | None = None
    tenant: str | None = None
    cache_salt: str | None = None
    all: _Flag = False


def _by_token(bias: dict[str, float]) -> dict[int, float]:
    """JSON's keys are strings. Raises ApiError: one that is no token id."""
    for token in bias:
        if not re.fullmatch("[0-9]{1,9}", token):
            raise ApiError(400, "the keys of logit_bias must be token ids", "logit_bias")
    return {int(token): value for token, value in bias.items()}


def _or(value: float | None, default: Any) -> Any:
    return default if value is None else value
