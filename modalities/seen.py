"""Which pictures and clips were seen before, and which of them are like a new one.

This is for people: it shows similar pictures, and decides nothing about reuse.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.modalities.backlog import Backlog
from kvshare_mm.modalities.embed import ImageEmbedder, embed_sound
from kvshare_mm.modalities.one_core import start_on_one_core
from kvshare_mm.stream import MediaItem, Modality

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SeenMedium:
    """A picture or clip that was sent before.

    Attributes:
        modality: "image", "audio" or "video".
        content_hash: 16 hex digits, as in a request's provenance.
        label: its sizes, in words.
        times: requests that brought it.
        similarity: cosine to what was asked for, -1 to 1; 1 for what is the same to the model.
    """

    modality: str
    content_hash: str
    label: str
    times: int = 1
    similarity: float = 1.0


class SeenMedia:
    """Remembers media by namespace. Embeds them on a thread of its own. Thread-safe.

    Args:
        open_embedder: loads the model for pictures; called once, when it is first needed.
        capacity: media remembered in a namespace; the longest not seen is forgotten.

    Attributes:
        counters: ``embedded``, ``embed_failed``; ``embed_closed``, of what came after the end.
    """

    def __init__(self, open_embedder: Callable[[], ImageEmbedder], capacity: int = 4096) -> None:
        self.counters: Counter[str] = Counter()
        self._open = open_embedder
        self._capacity = capacity
        self._embedder: ImageEmbedder | None = None
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        self._backlog = Backlog()
        self._closed = False
        self._known: dict[str, OrderedDict[str, tuple[SeenMedium, Vector]]] = {}
        self._queue: queue.SimpleQueue[tuple[MediaItem, str] | None] = queue.SimpleQueue()
        self._thread = start_on_one_core(self._work, "kvshare-seen")

    def add(self, items: Sequence[MediaItem], ns: str) -> None:
        """Remember a request's media; returns at once."""
        with self._lock:
            if self._closed:  # nobody would do it, and who waited for it would wait for ever
                self.counters["embed_closed"] += len(items)
                return
            for item in items:
                self._backlog.give()
                self._queue.put((item, ns))

    def like(self, item: MediaItem, ns: str, k: int = 5) -> list[SeenMedium]:
        """The `k` media of a namespace that are most like an item, the most alike first.

        Raises:
            ModelLoadError: the embedder cannot be loaded.
        """
        vector = self._embed(item)
        with self._lock:
            known = [
                (medium, other)
                for medium, other in self._known.get(ns, {}).values()
                if medium.modality == item.modality.value
            ]
        if not known:
            return []
        cosines = np.stack([other for _, other in known]) @ vector
        best = np.argsort(-cosines, kind="stable")[:k]
        return [replace(known[i][0], similarity=float(cosines[i])) for i in best]

    def forget(self, ns: str | None = None) -> None:
        """Forget all media, or those of a namespace."""
        with self._lock:
            for name in list(self._known) if ns is None else [ns]:
                self._known.pop(name, None)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all media given so far are remembered; False if time ran out."""
        return self._backlog.wait(timeout_s)

    def close(self) -> None:
        """Stop the thread once it has remembered what it was given."""
        with self._lock:
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                self._remember(*task)
            except Exception as error:
                # Nobody waits for it, and nothing is decided by it.
                self.counters["embed_failed"] += 1
                logger.warning("a medium was not remembered: %s", error)
            finally:
                self._backlog.did()

    def _remember(self, item: MediaItem, ns: str) -> None:
        with self._lock:
            known = self._known.setdefault(ns, OrderedDict()).get(item.digest)
        if known is None:
            medium = SeenMedium(item.modality.value, item.digest[:16], item.label)
            vector = self._embed(item)
            self.counters["embedded"] += 1
        else:
            medium, vector = replace(known[0], times=known[0].times + 1), known[1]
        with self._lock:
            mine = self._known.setdefault(ns, OrderedDict())
            mine[item.digest] = medium, vector
            mine.move_to_end(item.digest)
            if len(mine) > self._capacity:
                mine.popitem(last=False)

    def _embed(self, item: MediaItem) -> Vector:
        if item.content is None:
            raise ValueError(f"{item} has no content to embed")
        content = item.content()
        if item.modality is Modality.AUDIO:
            return embed_sound(*content)
        with self._loading:
            if self._embedder is None:
                self._embedder = self._open()
        return self._embedder.embed([content]).reshape(-1)


def opener(name: str) -> Callable[[], ImageEmbedder]:
    """Loads a picture embedder once; if that fails, says so again without trying again."""
    failure: list[ModelLoadError] = []

    def open_embedder() -> ImageEmbedder:
        if failure:
            raise failure[0]
        try:
            return ImageEmbedder(name)
        except ModelLoadError as error:
            failure.append(error)
            raise

    return open_embedder
