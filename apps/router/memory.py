"""What was sent to whom: hashes of n-grams, by tenant and replica."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import xxhash

from kvshare_mm.apps.router.prompt import Prompt
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.lexical import LexicalIndex

NGRAMS = 128
"""Most n-grams kept of one request: shares are off by 4% at most in two of three cases."""

# Requests are found by so many n-grams, and the first of them compared by all that are kept.
_LOOKED_UP, _CANDIDATES = 32, 4
# Of a request's name, here and in the index.
_BYTES = 400


class Memory:
    """Requests by what they are alike to; those used longest ago are forgotten first.

    A request takes about 2.6 KB where templates repeat; at most ``28 * NGRAMS`` bytes (see
    `LexicalIndex`) and 0.7 KB, and 1 KB more if it is the only one of its tenant.

    Args:
        max_requests: most requests known.
    """

    def __init__(self, max_requests: int = 100_000) -> None:
        self._max_requests = max_requests
        self._index = LexicalIndex(max_ngrams=NGRAMS, max_query_ngrams=_LOOKED_UP, budget=4096)
        self._known: OrderedDict[str, bool] = OrderedDict()  # whether it was answered

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes, about."""
        return self._index.num_bytes + _BYTES * len(self._known)

    def shares(self, prompt: Prompt, replicas: Iterable[int]) -> dict[int, float]:
        """Of the prompt's n-grams, the share that the best earlier request of each replica has."""
        namespaces = {replica: _namespace(prompt, replica) for replica in replicas}
        closest = self._index.closest(namespaces.values(), prompt.words, _CANDIDATES)
        for request, _ in closest.values():
            self._known.move_to_end(request)
        return {replica: closest.get(name, ("", 0.0))[1] for replica, name in namespaces.items()}

    def add(self, prompt: Prompt, replica: int, answered: bool = False) -> str | None:
        """A replica was sent a prompt, or answered it.

        Returns:
            What to `forget` if it does not answer; None: it answered it, then or earlier.
        """
        namespace = _namespace(prompt, replica)
        request = f"{namespace}-{xxhash.xxh3_128_hexdigest(prompt.words.tobytes())}"
        is_new = request not in self._known
        answered |= self._known.get(request, False)
        self._known[request] = answered
        self._known.move_to_end(request)
        if is_new:
            self._index.add([IndexRecord(request, namespace, prompt.words)])
        while len(self._known) > self._max_requests:
            self._index.remove([self._known.popitem(last=False)[0]])
        return None if answered else request

    def forget(self, request: str) -> None:
        """It was not answered there, unless somebody else who asked the same was."""
        if self._known.get(request) is False:
            del self._known[request]
            self._index.remove([request])


def _namespace(prompt: Prompt, replica: int) -> str:
    return f"{prompt.namespace}-{replica}"
