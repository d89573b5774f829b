"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of one growing answer.

    A byte-level tokenizer may split a character over tokens; text is released once it is whole.
    Text that could be the beginning of a stop string is held back until that is decided.

    Args:
        tokenizer: has ``decode(ids, skip_special_tokens=...)``.
        stop: strings that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._hold = max((len(s) - 1 for s in stop), default=0)
        self._ids: list[int] = []
        self._from = 0  # first token of the window that is decoded
        self._to = 0  # tokens before this one are in `text`
        self._sent = 0
        self.text = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """Append a token; returns the new text that can be shown."""
        self._ids.append(token_id)
        # Decoding from a few tokens back keeps the spaces that depend on the neighbour.
        before = self._decode(self._ids[self._from : self._to])
        after = self._decode(self._ids[self._from :])
        if len(after) > len(before) and not after.endswith(_INCOMPLETE):
            self._from, self._to = self._to, len(self._ids)
            self._append(after[len(before) :])
        return self._release(self._hold)

    def finish(self) -> str:
        """The rest of the text, held back until now."""
        if not self.stopped:
            before = self._decode(self._ids[self._from : self._to])
            self._append(self._decode(self._ids[self._from :])[len(before) :])
        return self._release(0)

    def _append(self, new: str) -> None:
        seen = max(0, len(self.text) - self._hold)
        self.text += new
        hits = [at for s in self._stop if (at := self.text.find(s, seen)) >= 0]
        if hits:
            self.text = self.text[: min(hits)]
            self.stopped = True

    def _release(self, hold: int) -> str:
        end = len(self.text) if self.stopped else max(self._sent, len(self.text) - hold)
        new, self._sent = self.text[self._sent : end], max(self._sent, end)
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
