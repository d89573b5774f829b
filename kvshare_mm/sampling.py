"""Sampling: parameters, and the choice of the next token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvshare_mm.errors import InvalidRequestError, ModelOutputError
from kvshare_mm.forms import Form
from kvshare_mm.grammar import Grammar
from kvshare_mm.outputs import TokenLogprob

_MAX_LOGPROBS = 20
_MAX_STOPS, _MAX_STOP_CHARACTERS = 64, 1024
_MAX_BIASED = 1024
_SHOWN = 100
_MIN_TEMPERATURE = 1e-5  # below it the division would overflow; the answer is greedy anyway
_LEAST_REPETITION, _MOST_REPETITION = 1e-5, 1e5  # beyond them logits would overflow
_ANY_OBJECT = {"type": "object"}
_NO_PROMPT = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is decoded; names and meanings are vLLM's.

    Attributes:
        max_tokens: longest answer; None: until the context is full.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens with this total probability, in (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
        seed: makes sampling repeatable.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: go on after the end token.
        logprobs: how many alternatives to report a token (0: the chosen one only); None: none.
            They are the model's own, before penalties, bias and temperature, but for tokens that
            `response_format` forbids: those are left out of the sum.
        presence_penalty: taken from the logit of each token that the answer has, in [-2, 2].
        frequency_penalty: the same, as often as the answer has it.
        repetition_penalty: above 0; logits of tokens in prompt or answer are divided by it, or
            multiplied if they are negative.
        logit_bias: added to the logits of these token ids, each in [-100, 100]; 1024 at most.
        response_format: OpenAI's: ``{"type": "json_object"}`` or ``{"type": "json_schema",
            "json_schema": {"schema": ...}}``. The answer follows it unless it is cut by length or
            by a stop string; None, or the type "text": any answer.
        structured_outputs: vLLM's: an object with one of ``regex``, ``grammar`` (Lark's, or GBNF),
            ``choice`` (a list of answers) and ``json`` (a schema). The whole answer follows it.

    Raises:
        InvalidRequestError: a value outside its range, with the field's name.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    response_format: Mapping[str, Any] | None = field(default=None, hash=False)
    structured_outputs: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        stop: object = () if self.stop is None else self.stop
        if isinstance(stop, str):
            stop = (stop,)
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, list) else stop)
        bias: object = {} if self.logit_bias is None else self.logit_bias
        object.__setattr__(self, "logit_bias", dict(bias) if isinstance(bias, Mapping) else bias)
        checks = {
            "max_tokens": self.max_tokens is None
            or (_whole(self.max_tokens) and self.max_tokens > 0),
            "temperature": _number(self.temperature) and 0 <= self.temperature <= 100,
            "top_p": _number(self.top_p) and 0 < self.top_p <= 1,
            "top_k": _whole(self.top_k) and self.top_k >= -1,
            "min_p": _number(self.min_p) and 0 <= self.min_p <= 1,
            "seed": self.seed is None or (_whole(self.seed) and -(2**63) <= self.seed < 2**64),
            # Each is looked for in every piece of text, in the engine's only thread.
            "stop": isinstance(self.stop, tuple)
            and len(self.stop) <= _MAX_STOPS
            and all(isinstance(s, str) and 0 < len(s) <= _MAX_STOP_CHARACTERS for s in self.stop),
            "ignore_eos": isinstance(self.ignore_eos, bool),
            "logprobs": self.logprobs is None
            or (_whole(self.logprobs) and 0 <= self.logprobs <= _MAX_LOGPROBS),
            "presence_penalty": _number(self.presence_penalty) and -2 <= self.presence_penalty <= 2,
            "frequency_penalty": _number(self.frequency_penalty)
            and -2 <= self.frequency_penalty <= 2,
            "repetition_penalty": _number(self.repetition_penalty)
            and 0 < self.repetition_penalty < math.inf,
            "logit_bias": isinstance(self.logit_bias, dict)
            and len(self.logit_bias) <= _MAX_BIASED
            and all(
                _whole(token) and token >= 0 and _number(value) and -100 <= value <= 100
                for token, value in self.logit_bias.items()
            ),
        }
        for name, good in checks.items():
            if not good:
                shown = repr(getattr(self, name))[:_SHOWN]
                raise InvalidRequestError(
                    f"{name}={shown} is not allowed; see SamplingParams", name
                )

        if not _is_format(self.response_format):
            raise InvalidRequestError(
                "response_format must be an object whose type is text, json_object or "
                "json_schema; the last has its schema, an object, under json_schema.schema",
                "response_format",
            )

        if not _is_guide(self.structured_outputs):
            raise InvalidRequestError(
                "structured_outputs must have one of regex and grammar (text), choice (a list of "
                "texts) and json (a schema, or a schema's text)",
                "structured_outputs",
            )
        if self.structured_outputs is not None and _kind(self.response_format) != "text":
            raise InvalidRequestError(
                "either response_format or structured_outputs", "structured_outputs"
            )

    @property
    def form(self) -> Form | None:
        """What the answer must look like, if anything."""
        if self.structured_outputs is not None:
            [(kind, value)] = _guide(self.structured_outputs).items()
            if kind == "json" and isinstance(value, str):
                value = json.loads(value)
            return Form(kind, value, "structured_outputs")  # type: ignore[arg-type]
        if (kind := _kind(self.response_format)) == "text":
            return None
        assert self.response_format is not None
        if kind == "json_object":
            return Form("json", _ANY_OBJECT)
        return Form("json", self.response_format["json_schema"]["schema"])

    def check(self, vocab_size: int) -> None:
        """Raises InvalidRequestError: token ids that the model does not have."""
        if (last := max(self.logit_bias, default=0)) >= vocab_size:
            raise InvalidRequestError(
                f"logit_bias has token {last}; token ids must lie in 0..{vocab_size - 1}, the "
                "model's vocabulary",
                "logit_bias",
            )


def _kind(response_format: Mapping[str, Any] | None) -> str:
    return (response_format or {}).get("type") or "text"


def _guide(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given for name, given in value.items() if given is not None}


def _is_guide(value: object) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    guide = _guide(value)
    if len(guide) != 1:
        return False
    [(kind, given)] = guide.items()
    if kind == "choice":
        texts = given if isinstance(given, list | tuple) else ()
        return bool(texts) and all(isinstance(text, str) and text for text in texts)
    if kind == "json" and isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return False
    return (
        isinstance(given, Mapping)
        if kind == "json"
        else (kind in ("regex", "grammar") and isinstance(given, str) and bool(given))
    )


def _is_format(value: object) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    kind = value.get("type")
    if kind != "json_schema":
        return kind in ("text", "json_object")
    named = value.get("json_schema")
    return isinstance(named, Mapping) and isinstance(named.get("schema"), Mapping)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return _whole(value) or isinstance(value, float)


class Penalties:
    """What a request's bias, its prompt and its answer so far do to its logits.

    In vLLM's order: the bias, then repetition, frequency, presence.

    Args:
        params: the request's parameters.
        prompt: ``[N]`` its token ids.
        device: where the logits are.
    """

    def __init__(self, params: SamplingParams, prompt: np.ndarray, device: torch.device) -> None:
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._repetition = min(max(params.repetition_penalty, _LEAST_REPETITION), _MOST_REPETITION)
        self._prompt = torch.from_numpy(prompt.astype(np.int64)).to(device)
        self._biased = torch.tensor([*params.logit_bias], dtype=torch.int64, device=device)
        self._bias = torch.tensor([*params.logit_bias.values()], dtype=torch.float32, device=device)
        self._in_prompt = self._counts = torch.empty(0)

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether a request asks for any."""
        return bool(
            params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1
            or params.logit_bias
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits to choose from.

        Args:
            logits: ``[vocab_size]`` float32; they stay as they are.

        Returns:
            ``[vocab_size]`` float32.
        """
        if not len(self._counts):
            self._counts = torch.zeros_like(logits)
            self._in_prompt = torch.zeros_like(logits, dtype=torch.bool)
            self._in_prompt[self._prompt[self._prompt < len(logits)]] = True
            # A tokenizer may have more tokens than its model has rows.
            known = self._biased < len(logits)
            self._biased, self._bias = self._biased[known], self._bias[known]
        logits = logits.index_add(0, self._biased, self._bias)
        answered = self._counts > 0
        if self._repetition != 1:
            factor = self._repetition
            less = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self._in_prompt | answered, less, logits)
        return logits - self._frequency * self._counts - self._presence * answered

    def add(self, token: int) -> None:
        """The answer goes on with this token."""
        self._counts[token] += 1


class Sampler:
    """Draws one request's tokens.

    Args:
        params: the request's parameters.
        device: where the logits are.
        prompt: ``[N]`` token ids of its prompt.
        grammar: of its answer, from the start; None: any token may come.
    """

    def __init__(
        self,
        params: SamplingParams,
        device: torch.device,
        prompt: np.ndarray = _NO_PROMPT,
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self._grammar = None if grammar is None else grammar.copy()
        self._penalties = Penalties(params, prompt, device) if Penalties.wanted(params) else None
        self._generator: torch.Generator | None = None
        if params.temperature > 0:
            self._generator = torch.Generator(device)
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed % (1 << 63))

    @property
    def complete(self) -> bool:
        """Whether the answer has the form that it must have and nothing can follow."""
        return self._grammar is not None and self._grammar.complete

    def sample(self, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token, and its log probability if asked for.

        Args:
            logits: ``[vocab_size]``; minus infinity for tokens that must not come.

        Raises:
            ModelOutputError: NaN or plus infinity among them, or nothing else than minus infinity.
            InvalidRequestError: a schema that took too long to follow.
        """
        logits = logits.float()
        _check(logits)
        if self._grammar is not None:
            allowed = self._grammar.allowed(len(logits)).to(logits.device)
            logits = logits.masked_fill(~allowed, float("-inf"))
            _check(logits)  # the model may forbid what the form asks for
        left = logits if self._penalties is None else self._penalties.apply(logits)
        token = self._choose(left)
        while self._grammar is not None and (refused := self._grammar.add(token)) is not None:
            refused = refused[refused < len(logits)].to(logits.device)
            logits = logits.index_fill(0, refused, float("-inf"))
            left = left.index_fill(0, refused, float("-inf"))
            if left.max() == float("-inf"):
                self._grammar.none_left()
            token = self._choose(left)
        if self._penalties is not None:
            self._penalties.add(token)
        if self.params.logprobs is None:
            return token, None
        logprobs = logits.log_softmax(-1)
        count = min(self.params.logprobs, len(logprobs))
        top = logprobs.topk(count) if count else None
        alternatives = (
            tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
        )
        return token, TokenLogprob(token, float(logprobs[token]), alternatives)

    def _choose(self, logits: torch.Tensor) -> int:
        return int(logits.argmax()) if self._generator is None else self._draw(logits)

    def _draw(self, logits: torch.Tensor) -> int:
        p = self.params
        logits = logits / max(p.temperature, _MIN_TEMPERATURE)
        if 0 < p.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(p.top_k).values[-1], float("-inf"))
        probs = logits.softmax(-1)
        if p.min_p:
            probs = probs.masked_fill(probs < p.min_p * probs.max(), 0.0)
        if p.top_p < 1:
            ordered, order = probs.sort(descending=True)
            # A token stays if what is more likely than it does not reach top_p yet.
            beyond = ordered.cumsum(-1) - ordered >= p.top_p * probs.sum()
            beyond[0] = False  # a top_p too small for float32 is 0
            probs = probs.index_fill(0, order[beyond], 0.0)
        return int(torch.multinomial(probs, 1, generator=self._generator))


def _check(logits: torch.Tensor) -> None:
    # The largest: NaN, if there is one. The token chosen from NaN would be an answer like any.
    if not math.isfinite(largest := float(logits.max())):
        raise ModelOutputError(
            f"the model's output is not a number (its largest logit is {largest}); the request "
            "was ended and none of its KV is kept"
        )
