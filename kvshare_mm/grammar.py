"""Answers of a form: what may come next as masks over the vocabulary, by llguidance."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.forms import Form, grammar, source
from kvshare_mm.tools import Style, Tools

_KEPT = 32
_MAX_STATES = 50_000  # of an answer's lexer: 100 MB
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
        field: of the request, for errors.
    """

    def __init__(self, matcher: Any, blank: torch.Tensor, field: str) -> None:
        self._matcher = matcher
        self._blank = blank
        self._field = field
        self._num_blanks = 0

    def copy(self) -> Self:
        """The same for another answer; from the start, if this one has not begun."""
        return type(self)(self._matcher.deep_copy(), self._blank, self._field)

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
                f"{self._field}: it cannot be followed: {_reason(self._matcher)}", self._field
            )


class Grammars:
    """Reads forms for one tokenizer; may be asked from any thread.

    Args:
        tokenizer: of the model; looked through when the first form comes, which takes a second.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = sorted(i for i in eos_token_ids if i < len(tokenizer))
        self._lock = threading.Lock()
        self._vocabulary: tuple[Any, torch.Tensor] | None = None
        self._read = lru_cache(_KEPT)(grammar)

    def of(
        self, form: Form | None, tools: Tools | None = None, style: Style = "hermes"
    ) -> Grammar | None:
        """The grammar of answers that have a form, or are calls of tools; None: of any answers.

        Raises:
            InvalidRequestError: a form that is none, is too long, or cannot be enforced.
        """
        asked = source(form, tools, style)
        return None if asked is None else self._begun(self._read(asked[0]), asked[1])

    def _begun(self, grammar: str, field: str) -> Grammar:
        """Each answer has a matcher of its own: copies share what their lexer has seen, and its
        limit."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=_MAX_STATES, max_items_in_row=_MAX_WAYS, verbose_errors=False
        )
        tokens, blank = self._all_tokens(field)
        begun = Grammar(LLMatcher(tokens, grammar, log_level=0, limits=limits), blank, field)
        begun.allowed(1)  # what cannot be enforced fails here
        return begun

    def _all_tokens(self, field: str) -> tuple[Any, torch.Tensor]:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None:
                try:
                    tokens = from_tokenizer(self._tokenizer, eos_token=self._eos or None)
                except ValueError as error:
                    raise InvalidRequestError(
                        f"{field} does not work with this model's tokenizer: {error}", field
                    ) from error
                text = (tokens.decode_bytes([i]) for i in range(tokens.vocab_size))
                self._vocabulary = tokens, torch.tensor([t.isspace() for t in text])
            return self._vocabulary


def _reason(matcher: Any) -> str:
    return str(matcher.get_error()).partition("\n<")[0]
