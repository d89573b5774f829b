"""Which tokens go on with the word before them: where a number or a name that was edited ends."""

from __future__ import annotations

import string

import numpy as np
from transformers import PreTrainedTokenizerBase

# A token that begins so belongs to what stands before it: 57|66, A7F3|-|9921. Tokens that begin
# with a space look different in every vocabulary; scripts without spaces have no such words.
_JOINING = frozenset(string.ascii_letters + string.digits + "-_/.:#@")


def joining_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """``[vocabulary]`` bool: the token, by its id, goes on with the word before it."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([bool(name) and name[0] in _JOINING for name in names], dtype=bool)


def joined_positions(keys: np.ndarray, joining: np.ndarray) -> np.ndarray:
    """``[N]`` bool: positions of `keys` (``[N]`` uint64) whose token is among `joining`.

    Keys of pictures and sound are no tokens.
    """
    found = np.zeros(len(keys), dtype=bool)
    words = keys < len(joining)
    found[words] = joining[keys[words].astype(np.int64)]
    return found


def facts_of(
    tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray, changed: np.ndarray
) -> frozenset[int]:
    """Tokens of the numbers and names among some positions.

    Digits, and words with a capital letter that do not begin a sentence.

    Args:
        token_ids: ``[N]`` of a prompt.
        changed: ``[N]`` bool: the positions.
    """
    found = set()
    for at in np.flatnonzero(changed).tolist():
        text = str(tokenizer.decode([int(token_ids[at])])).strip()
        if any(c.isdigit() for c in text) or (
            text[:1].isupper() and at and not _ends_sentence(tokenizer, int(token_ids[at - 1]))
        ):
            found.add(int(token_ids[at]))
    return frozenset(found)


def _ends_sentence(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    text = str(tokenizer.decode([token_id]))
    return not text.strip() or text.rstrip()[-1] in ".!?:>" or "\n" in text
