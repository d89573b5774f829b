"""What differs between two answers: words, and among them numbers and names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

# Aligning takes the square of an answer's words: what lies behind these is one change.
_MOST_WORDS = 1_000
_WORD = re.compile(r"\w(?:[\w.,:/'’%-]*[\w%])?")

Piece = tuple[str, bool]
"""Text as it stands, and whether it differs."""


def marked(full: str, reused: str) -> tuple[list[Piece], list[Piece]]:
    """Two answers, each cut into pieces that are the same in the other and pieces that are not."""
    words = [re.findall(r"\s*\S+\s*$|\s*\S+", text) for text in (full, reused)]
    a, b = ([word.strip() for word in side[:_MOST_WORDS]] for side in words)
    left: list[Piece] = []
    right: list[Piece] = []
    for op, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left.append(("".join(words[0][i:j]), op != "equal"))
        right.append(("".join(words[1][k:m]), op != "equal"))
    for side, all_words in zip((left, right), words, strict=True):
        side.append(("".join(all_words[_MOST_WORDS:]), True))
    return [piece for piece in left if piece[0]], [piece for piece in right if piece[0]]


def compared(
    full: Mapping[str, Any], other: Mapping[str, Any], known: frozenset[str]
) -> dict[str, Any]:
    """How an answer stands to the one computed in full.

    Args:
        full, other: ``text``, and whether it was ``cut`` at its longest length.
        known: words that are also written small: they are no names.

    Returns:
        ``outcome``: "same", "changed", or "cut", which is the same as far as both go; ``numbers``
        and ``names``: for each answer those that it alone has, or None.
    """
    if full["text"] == other["text"]:
        return {"outcome": "same", "numbers": None, "names": None}
    a, b = _as_far_as_both_go(full, other)
    said = [{word.lower() for word in _WORD.findall(text)} for text in (a, b)]
    numbers, names = (
        [
            [w for w in kind(text) if w.lower() not in theirs]
            for text, theirs in ((a, said[1]), (b, said[0]))
        ]
        for kind in (_numbers, lambda text: _names(text, known))
    )
    return {
        "outcome": "cut" if a == b and (full["cut"] or other["cut"]) else "changed",
        "numbers": numbers if any(numbers) else None,
        "names": names if any(names) else None,
    }


def small_words(texts: Iterable[str]) -> frozenset[str]:
    """All words that are written in small letters somewhere."""
    return frozenset(w for text in texts for w in _WORD.findall(text) if w.islower())


def _as_far_as_both_go(full: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str]:
    """What one answer says behind the end of another that was cut is no change, and the last word
    of one that was cut may be half a word."""
    a, b = (x["text"].split()[: -1 if x["cut"] else None] for x in (full, other))
    matcher = SequenceMatcher(None, a[:_MOST_WORDS], b[:_MOST_WORDS], autojunk=False)
    *blocks, _ = matcher.get_matching_blocks()
    i, j = (blocks[-1].a, blocks[-1].b) if blocks else (0, 0)
    if other["cut"]:
        a = a[: i + len(b) - j]
    if full["cut"]:
        b = b[: j + len(a) - i]
    return " ".join(a), " ".join(b)


def _numbers(text: str) -> list[str]:
    return [w for w in dict.fromkeys(_WORD.findall(text)) if any(c.isdigit() for c in w)]


def _names(text: str, known: frozenset[str]) -> list[str]:
    words = dict.fromkeys(_WORD.findall(text))
    return [w for w in words if w[0].isupper() and w.lower() not in known and not _numbers(w)]
