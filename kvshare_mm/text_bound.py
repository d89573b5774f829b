"""How long a text can be at most to fit the context: known without tokenising it."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from kvshare_mm.errors import InvalidRequestError

# Composing characters shortens a text to a third at most; other normalizers do not do more.
_NORMALIZED = 4


class TextBound:
    """Refuses texts that have more bytes than any text of as many tokens as the context holds.

    Tokenising takes time and memory in proportion to a text, of which a client can send much more
    than any model reads.

    Args:
        tokenizer: of the model.
        max_tokens: of the context.

    Attributes:
        max_bytes: UTF-8 bytes of the context's tokens, if all were the vocabulary's longest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.max_tokens = max_tokens
        self.max_bytes = max_tokens * _longest(tokenizer, backend)
        self._normalizer = getattr(backend, "normalizer", None)

    def check(self, texts: Iterable[str], field: str) -> None:
        """Raises InvalidRequestError: the texts of one prompt cannot fit."""
        left = self.max_bytes
        for text in texts:
            left -= self._size(text, left)
            if left < 0:
                raise InvalidRequestError(
                    f"the prompt has more than {self.max_bytes} bytes, and no text of "
                    f"{self.max_tokens} tokens, which the context holds, has more",
                    field,
                )

    def check_ids(self, num_tokens: int, field: str) -> None:
        """Raises InvalidRequestError: so many token ids cannot fit."""
        if num_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"{num_tokens} tokens; the context holds {self.max_tokens}", field
            )

    def _size(self, text: str, left: int) -> int:
        if len(text) > _NORMALIZED * left:  # a character has a byte at least
            return len(text)
        size = len(text.encode("utf-8", "surrogatepass"))
        if size <= left or self._normalizer is None or size > _NORMALIZED * left:
            return size
        whole = text.encode("utf-8", "replace").decode()
        return len(self._normalizer.normalize_str(whole).encode())


def _longest(tokenizer: PreTrainedTokenizerBase, backend: object) -> int:
    """Bytes of the vocabulary's longest token."""
    # A character of such a vocabulary stands for a byte.
    by_bytes = isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)
    added = tokenizer.get_added_vocab()
    return max(
        len(token) if by_bytes and token not in added else len(token.encode("utf-8", "replace"))
        for token in tokenizer.get_vocab()
    )
