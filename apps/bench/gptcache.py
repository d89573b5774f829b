"""GPTCache (https://github.com/zilliztech/GPTCache): a stored answer for a similar question.

The real package (0.1.44 installs and runs in this environment), as its documentation sets it up:
`init_similar_cache` over SQLite and FAISS, `SearchDistanceEvaluation`, and the default similarity
threshold of 0.8. One thing differs: its default embedding (ONNX, fetched from a hub) is replaced by
the project's sentence embedder, all-MiniLM-L6-v2, which is also what GPTCache's own `SBERT` uses.

What the default threshold means: the similarity is 4 minus the squared distance of the unit
embeddings, and 0.8 of the range 0..4 must be reached. So a cosine of 0.6 is a hit.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.errors import ConfigError

if TYPE_CHECKING:
    from kvshare_mm.modalities.embed import TextEmbedder

THRESHOLD = 0.8
_MAX_DISTANCE = 4.0
_NEEDS = ("gptcache", "sqlalchemy", "faiss")
# GPTCache evicts by default above 1,000 questions; a benchmark wants to say itself how many.
_MAX_QUESTIONS = 1 << 20


def counts_as_hit(cosine: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether GPTCache would answer from the store, by the cosine of the nearest question."""
    squared_distance = np.clip(2 - 2 * cosine, 0, _MAX_DISTANCE)
    hit: NDArray[np.bool_] = _MAX_DISTANCE - squared_distance >= THRESHOLD * _MAX_DISTANCE
    return hit


class GPTCacheStore:
    """One GPTCache instance of its own, in a temporary folder.

    Args:
        embedder: makes the vectors.

    Raises:
        ConfigError: gptcache or what it stores in is not installed.
    """

    def __init__(self, embedder: TextEmbedder) -> None:
        _check_installed()
        from gptcache import Cache, Config
        from gptcache.adapter.api import get, init_similar_cache, put
        from gptcache.manager import CacheBase, VectorBase, get_data_manager

        self._get, self._put = get, put
        self._folder = tempfile.TemporaryDirectory(prefix="kvshare-gptcache-")
        root = Path(self._folder.name)
        self._answers = CacheBase("sqlite", sql_url=f"sqlite:///{root / 'answers.db'}")
        self._stores = get_data_manager(
            self._answers,
            VectorBase("faiss", dimension=embedder.dim, index_path=str(root / "faiss.index")),
            max_size=_MAX_QUESTIONS,
        )
        self._cache = Cache()
        init_similar_cache(
            cache_obj=self._cache,
            embedding=_Embedding(embedder),
            data_manager=self._stores,
            config=Config(similarity_threshold=THRESHOLD, disable_report=True),
        )

    def put(self, question: str, answer: str) -> None:
        self._put(question, answer, cache_obj=self._cache)

    def get(self, question: str) -> str | None:
        answer: str | None = self._get(question, cache_obj=self._cache)
        return answer

    def close(self) -> None:
        # GPTCache closes its stores once more when Python exits, and needs the folder for that.
        self._stores.close = lambda: None
        self._answers.Session().get_bind().dispose()
        self._folder.cleanup()


class _Embedding:
    """The project's embedder, as GPTCache calls one."""

    def __init__(self, embedder: TextEmbedder) -> None:
        self._embedder = embedder
        self.dimension = embedder.dim

    def to_embeddings(self, data: Any, **_: Any) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self._embedder.embed([data])[0]
        return vector


def _check_installed() -> None:
    # GPTCache runs `pip install` by itself for what it misses; a benchmark must not.
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the method gptcache needs {', '.join(missing)}: pip install 'kvshare-mm[bench]'"
        )


def opener() -> Callable[[], GPTCacheStore]:
    """What opens empty stores over one embedder. Raises ConfigError as `GPTCacheStore` does."""
    _check_installed()
    from kvshare_mm.modalities.embed import TextEmbedder

    embedder = TextEmbedder()
    return lambda: GPTCacheStore(embedder)
