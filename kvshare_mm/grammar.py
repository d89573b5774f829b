"""Answers of a form: what may come next as masks over the vocabulary, by llguidance."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn, Self

import torch
from transformers import PreTrainedTokenizerBase

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.forms import Form, Written, grammar, source
from kvshare_mm.tools import Style, Tools
from kvshare_mm.unique_items import UniqueItems

_KEPT = 32
_MAX_STATES = 50_000  # of an answer's lexer: 100 MB
# Ways to go on that are followed at once, two to an optional property. With 2000, llguidance's own
# limit, a schema could take 400 ms a token of the engine's only thread; with these it is 25 ms.
_MAX_WAYS = 500
# Models indent JSON; one that does not know what to say would go on with blanks for ever.
_MAX_BLANKS = 16  # tokens in a row


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a tokenizer's tokens say.

    Attributes:
        tokens: llguidance's `LLTokenizer`.
        texts: by token id; none for those that end an answer and the like.
        blank: ``[vocabulary]`` bool: tokens of nothing but white space.
    """

    tokens: Any
    texts: list[bytes]
    blank: torch.Tensor

    @classmethod
    def of(cls, tokens: Any) -> Self:
        """Looked through."""
        texts = [tokens.decode_bytes([i]) for i in range(tokens.vocab_size)]
        # llguidance's mark of special tokens is no text.
        texts = [b"" if tokens.is_special_token(i) else text for i, text in enumerate(texts)]
        return cls(tokens, texts, torch.tensor([text.isspace() for text in texts]))

    @cached_property
    def _sorted(self) -> tuple[torch.Tensor, list[bytes]]:
        """Token ids in the order of their texts, int64, and the texts in this order."""
        order = sorted(range(len(self.texts)), key=self.texts.__getitem__)
        return torch.tensor(order), [self.texts[i] for i in order]

    def beginning(self, text: bytes) -> torch.Tensor:
        """Ids of the tokens that begin so."""
        order, texts = self._sorted
        start = bisect_left(texts, text)
        end = bisect_right(texts, text, start, key=lambda token: token[: len(text)])
        return order[start:end]


class Grammar:
    """What may come next in one answer.

    Args:
        matcher: llguidance's `LLMatcher`.
        vocabulary: of its tokenizer.
        field: of the request, for errors.
        unique: follows lists whose items must differ; None: there are none.
    """

    def __init__(
        self,
        matcher: Any,
        vocabulary: Vocabulary,
        field: str,
        unique: UniqueItems | None = None,
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._field = field
        self._unique = unique
        self._num_blanks = 0

    def copy(self) -> Self:
        """The same for another answer; from the start, if this one has not begun."""
        unique = None if self._unique is None else self._unique.copy()
        return type(self)(self._matcher.deep_copy(), self._vocabulary, self._field, unique)

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
        if self._num_blanks >= _MAX_BLANKS and (others := mask & ~self._vocabulary.blank).any():
            mask = others
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[: len(mask)] = mask[:vocab_size]
        return allowed

    def add(self, token: int) -> torch.Tensor | None:
        """The answer goes on with this token, one of `allowed`, if items differ with it.

        Returns:
            None: it does. Otherwise ids of tokens that must not come either, this one among them,
            and nothing is added.

        Raises:
            InvalidRequestError: it takes too long to tell what may follow.
        """
        if self._unique is not None:
            text = self._vocabulary.texts[token]
            try:
                refused = self._unique.add(text)
            except TimeoutError as error:
                self._fail(str(error))
            if refused is not None:
                return self._vocabulary.beginning(text[: refused + 1])
        self._matcher.consume_token(token)
        self._num_blanks = self._num_blanks + 1 if self._vocabulary.blank[token] else 0
        self._check()
        return None

    def none_left(self) -> NoReturn:
        """Raises InvalidRequestError: nothing may come, as all that could was refused."""
        self._fail("uniqueItems of a list that has all items that it can have and must have more")

    def _check(self) -> None:
        if self._matcher.is_error():
            self._fail(_reason(self._matcher))

    def _fail(self, reason: str) -> NoReturn:
        raise InvalidRequestError(f"{self._field}: it cannot be followed: {reason}", self._field)


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
        self._vocabulary: Vocabulary | None = None
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

    def _begun(self, written: Written, field: str) -> Grammar:
        """Each answer has a matcher of its own: copies share what their lexer has seen, and its
        limit."""
        from llguidance import LLTokenizer

        vocabulary = self._all_tokens(field)
        unique = None
        if written.unique:
            unique = UniqueItems(written.unique, _matcher(LLTokenizer("byte"), written.text))
        begun = Grammar(_matcher(vocabulary.tokens, written.text), vocabulary, field, unique)
        begun.allowed(1)  # what cannot be enforced fails here
        return begun

    def _all_tokens(self, field: str) -> Vocabulary:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None:
                try:
                    tokens = from_tokenizer(self._tokenizer, eos_token=self._eos or None)
                except ValueError as error:
                    raise InvalidRequestError(
                        f"{field} does not work with this model's tokenizer: {error}", field
                    ) from error
                self._vocabulary = Vocabulary.of(tokens)
            return self._vocabulary


def _matcher(tokens: Any, grammar: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_lexer_states=_MAX_STATES, max_items_in_row=_MAX_WAYS, verbose_errors=False
    )
    return LLMatcher(tokens, grammar, log_level=0, limits=limits)


def _reason(matcher: Any) -> str:
    return str(matcher.get_error()).partition("\n<")[0]
