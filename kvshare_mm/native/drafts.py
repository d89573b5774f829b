"""Drafts: what an answer may say next, guessed from what was said before.

A draft costs rows of the next forward and changes no answer: every token is drawn from the model's
own logits, in order, and drafts only decide how many tokens one forward gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq

import numpy as np

from kvshare_mm.native.acceptance import Acceptance

_LONGEST = 8  # tokens of what was said last that are looked for
_MOST = 8  # tokens of a draft
# Fewest tokens that have to agree: where a donor's answer goes on, and elsewhere in the prompt.
_LEAST_DONOR, _LEAST_SELF = 3, 2
_SURE = 6  # where so many agree in the prompt, what follows is likely to


class Drafter:
    """Drafts for one request.

    Args:
        prompt: ``[N]`` int64 token ids.
        answer: ``[A]`` int64: what a request like this one was answered, with this one's values.
        acceptance: how often drafts are right; default: nothing is known.
    """

    def __init__(
        self, prompt: np.ndarray, answer: np.ndarray, acceptance: Acceptance | None = None
    ) -> None:
        self._acceptance = acceptance or Acceptance()
        self._said = np.concatenate((prompt, np.empty(64, np.int64)))
        self._length = len(prompt)
        self._answer = np.concatenate((prompt[-_LONGEST:], answer))
        self._goes_on = min(_LONGEST, len(prompt))  # where the donor's answer is expected to
        self._kind, self._draft = "", list[int]()  # the last draft

    def add(self, tokens: Sequence[int]) -> None:
        """The answer goes on: with what of the last draft was right, and a token behind that
        unless it is over."""
        if self._draft:
            tried = min(len(self._draft), len(tokens))
            self._acceptance.learn(self._kind, tried, sum(map(eq, self._draft, tokens)))
            self._draft = []
        self._goes_on += len(tokens)
        while self._length + len(tokens) > len(self._said):
            self._said = np.concatenate((self._said, np.empty_like(self._said)))
        self._said[self._length : self._length + len(tokens)] = tokens
        self._length += len(tokens)

    def draft(self, most: int, batch: int = 1) -> list[int]:
        """Up to `most` tokens that may come next; `batch`: answers of the step, this one with
        them."""
        if most <= 0:
            return []
        said = self._said[: self._length]
        agree, at = _found(self._answer[:-1], said, self._goes_on)
        source, kind = self._answer, "donor"
        if agree >= _LEAST_DONOR:
            self._goes_on = at
        else:
            agree = 0
        own, place = _found(said[:-1], said, self._length)
        if own > agree and own >= _LEAST_SELF:
            agree, at, source = own, place, said
            kind = "sure" if own >= _SURE else "unsure"
        most = min(most, _MOST, 2 * agree, len(source) - at)
        most = self._acceptance.length(kind, most, batch)
        self._kind, self._draft = kind, source[at : at + most].tolist()
        return self._draft


def _found(source: np.ndarray, said: np.ndarray, near: int) -> tuple[int, int]:
    """How many of the last tokens said agree with those before a place of `source`, `_LONGEST` at
    most, and that place: where most do, and there the one nearest to `near`."""
    at, best = np.flatnonzero(source == said[-1]), None
    agree = 0
    while len(at):
        agree, best = agree + 1, at
        if agree == min(_LONGEST, len(said)):
            break
        at = at[at >= agree]
        at = at[source[at - agree] == said[-1 - agree]]
    if best is None:
        return 0, 0
    return agree, int(best[np.argmin(np.abs(best + 1 - near))]) + 1
