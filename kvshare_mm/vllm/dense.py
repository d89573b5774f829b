"""Donors by meaning inside vLLM: prompts are turned back into text, which a scheduler has not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from kvshare_mm.delta_tree import Node
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.semantic import Opened, SemanticIndex
from kvshare_mm.stream import MEDIA_BIT


class Dense:
    """The index of meaning, asked where shared words find nothing. Never fails a request.

    Args:
        open_index: opens the index and its embedder, in a thread of its own.
        tokenizer: the model's.
        limit: most donors of one search.
        counters: its failures are counted here.
    """

    def __init__(
        self, open_index: Callable[[], Opened], tokenizer: Any, limit: int, counters: Counter[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._index = SemanticIndex(open_index, [], lambda node_id, embedding: True, counters)

    def search(self, keys: np.ndarray, ns: str) -> tuple[str, ...]:
        """Ids of donors that mean something similar."""
        return self._index.search(ns, self._text(keys), self._limit)

    def add(self, node: Node) -> None:
        record = IndexRecord(node.node_id, node.namespace, node.alignment_keys)
        self._index.add(record, self._text(node.keys))

    def remove(self, node_id: str) -> None:
        self._index.remove(node_id)

    def close(self) -> None:
        self._index.close()

    def _text(self, keys: np.ndarray) -> str:
        words = keys[keys < MEDIA_BIT].astype(np.int64).tolist()
        return str(self._tokenizer.decode(words, skip_special_tokens=True))
