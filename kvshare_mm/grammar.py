"""Answers of a form: JSON schemas as masks over the vocabulary, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from kvshare_mm.errors import InvalidRequestError

_FIELD = "response_format"
_MAX_SCHEMA = 1 << 15  # characters: one of 2500 properties, which takes half a second to read
_KEPT = 32
_MAX_STATES = 50_000  # of an answer's lexer: 100 MB
# llguidance reads a schema without limits of its own, and where memory ends it ends the process.
# Some numbers are written out; patterns that must hold at once are multiplied with one another.
_MOST = {"minItems": 1_000, "maxItems": 1_000, "minProperties": 1_000, "maxProperties": 1_000,
         "minLength": 10_000, "maxLength": 10_000}  # fmt: skip
_MAX_PATTERNS = 8
_MAX_PATTERN = 200  # characters
_BESIDE_REF = {"$ref", "$defs", "definitions", "$schema", "$id", "$comment", "title", "description",
               "default", "examples", "deprecated"}  # fmt: skip
# Ways to go on that are followed at once, two to an optional property. With 2000, llguidance's own
# limit, a schema could take 400 ms a token of the engine's only thread; with these it is 25 ms.
_MAX_WAYS = 500
# Models indent JSON; one that does not know what to say would go on with blanks for ever.
_MAX_BLANKS = 16  # tokens in a row


class Grammar:
    """What may come next in one answer.

    Args:
        matcher: llguidance's `LLMatcher`.
        blank: ``[vocabulary]`` bool: tokens of nothing but white space.
    """

    def __init__(self, matcher: Any, blank: torch.Tensor) -> None:
        self._matcher = matcher
        self._blank = blank
        self._num_blanks = 0

    def copy(self) -> Self:
        """The same for another answer; from the start, if this one has not begun."""
        return type(self)(self._matcher.deep_copy(), self._blank)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Tokens that may come next; among them those that end an answer, once it may end.

        Returns:
            ``[vocab_size]`` bool, on the CPU.

        Raises:
            InvalidRequestError: it takes too long to tell.
        """
        # One byte a token; a model may have more rows than its tokenizer has tokens.
        found = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        mask = found != 0
        if self._num_blanks >= _MAX_BLANKS and (others := mask & ~self._blank).any():
            mask = others
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[: len(mask)] = mask[:vocab_size]
        return allowed

    def add(self, token: int) -> None:
        """The answer goes on with this token, one of `allowed`.

        Raises:
            InvalidRequestError: it takes too long to tell what may follow.
        """
        self._matcher.consume_token(token)
        self._num_blanks = self._num_blanks + 1 if self._blank[token] else 0
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequestError(
                f"{_FIELD}: the schema cannot be followed: {_reason(self._matcher)}", _FIELD
            )


class Grammars:
    """Reads schemas for one tokenizer; may be asked from any thread.

    Args:
        tokenizer: of the model; looked through when the first schema comes, which takes a second.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = sorted(i for i in eos_token_ids if i < len(tokenizer))
        self._lock = threading.Lock()
        self._vocabulary: tuple[Any, torch.Tensor] | None = None
        self._read = lru_cache(_KEPT)(_read)

    def of(self, schema: Mapping[str, Any] | None) -> Grammar | None:
        """The grammar of answers that follow a JSON schema; None: of any answers.

        Raises:
            InvalidRequestError: it is no schema, too long, or has keywords that cannot be enforced.
        """
        if schema is None:
            return None
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{_FIELD}: no JSON: {error}", _FIELD) from error
        if len(text) > _MAX_SCHEMA:
            raise InvalidRequestError(
                f"{_FIELD}: the schema has {len(text)} characters; at most {_MAX_SCHEMA}", _FIELD
            )
        return self._begun(self._read(text))

    def _begun(self, grammar: str) -> Grammar:
        """Each answer has a matcher of its own: copies share what their lexer has seen, and its
        limit."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=_MAX_STATES, max_items_in_row=_MAX_WAYS, verbose_errors=False
        )
        tokens, blank = self._all_tokens()
        begun = Grammar(LLMatcher(tokens, grammar, log_level=0, limits=limits), blank)
        begun.allowed(1)  # what cannot be enforced fails here
        return begun

    def _all_tokens(self) -> tuple[Any, torch.Tensor]:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None:
                try:
                    tokens = from_tokenizer(self._tokenizer, eos_token=self._eos or None)
                except ValueError as error:
                    raise InvalidRequestError(
                        f"{_FIELD} does not work with this model's tokenizer: {error}", _FIELD
                    ) from error
                text = (tokens.decode_bytes([i]) for i in range(tokens.vocab_size))
                self._vocabulary = tokens, torch.tensor([t.isspace() for t in text])
            return self._vocabulary


def _read(schema: str) -> str:
    from llguidance import LLMatcher

    if costly := _too_costly(json.loads(schema)):
        raise InvalidRequestError(f"{_FIELD}: {costly}", _FIELD)
    try:
        return str(LLMatcher.grammar_from_json_schema(schema))
    except ValueError as error:
        raise InvalidRequestError(f"{_FIELD}: {error}", _FIELD) from error


def _too_costly(schema: Any) -> str | None:
    """Why reading a schema might take more time or memory than there is; None: it does not.

    Names of properties look like keywords; those have schemas, keywords have numbers and the like.
    """
    num_patterns, parts = 0, [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        if not isinstance(part, dict):
            continue
        for name, value in part.items():
            if isinstance(value, int | float) and value > _MOST.get(name, value):
                return f"{name} can be {_MOST[name]} at most"
            if name == "multipleOf" and isinstance(value, int | float):
                return "multipleOf cannot be enforced"
            if name == "allOf" and isinstance(value, list) and len(value) > 1:
                return "allOf of more than one schema cannot be enforced"
            if name == "$ref" and isinstance(value, str) and part.keys() - _BESIDE_REF:
                return "keywords beside $ref cannot be enforced"
            if name == "pattern" and isinstance(value, str):
                num_patterns += 1
                if len(value) > _MAX_PATTERN:
                    return f"a pattern can have {_MAX_PATTERN} characters at most"
            if name == "patternProperties" and isinstance(value, dict):
                num_patterns += len(value)
                if any(len(each) > _MAX_PATTERN for each in value):
                    return f"a pattern can have {_MAX_PATTERN} characters at most"
        parts += part.values()
    if num_patterns > _MAX_PATTERNS:
        return f"{num_patterns} patterns; {_MAX_PATTERNS} are possible"
    return None


def _reason(matcher: Any) -> str:
    return str(matcher.get_error()).partition("\n<")[0]
