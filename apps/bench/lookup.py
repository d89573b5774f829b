"""`kvshare bench lookup`: is the right donor found among thousands, and how fast?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from kvshare_mm.apps.bench.prompts import read_pairs, read_prompts
from kvshare_mm.errors import ConfigError
from kvshare_mm.index.base import Candidate, IndexRecord
from kvshare_mm.index.lexical import LexicalIndex
from kvshare_mm.index.milvus import MilvusIndex

_NAMESPACE = "bench"
_RANKS = (1, 4, 8)
_EMBED_BATCH = 32


class Embedder(Protocol):
    """What is needed of `kvshare_mm.modalities.embed.TextEmbedder`."""

    name: str
    dim: int

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


def run_lookup(
    pairs_path: Path,
    pool_path: Path,
    tokenizer_encode: Callable[[str], list[int]],
    embedder: Embedder,
    index_dir: Path,
    limit_pool: int = 3000,
    *,
    limit_pairs: int | None = None,
    flush_every: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Hide every pair's donor among other prompts, then look for it with the pair's target.

    Args:
        pairs_path: JSON Lines of ``{"donor", "target"}``.
        pool_path: JSON Lines of ``{"text"}``: the other prompts. Those equal to a donor or a
            target are left out.
        tokenizer_encode: text to token ids, as the served model would get them.
        embedder: makes the vectors of the dense index.
        index_dir: folder for the Milvus Lite database; it must hold none yet.
        limit_pool: how many other prompts.
        limit_pairs: use the first so many pairs; None for all.
        flush_every: as in `MilvusIndex`.
        seed: of the order in which donors and others are stored.
        progress: show a progress bar.

    Returns:
        JSON-serialisable: ``records``, ``pairs``, ``build_s`` and, for each of ``methods``
        (``lexical``, ``milvus_sparse``, ``milvus_dense``, ``hybrid``): ``recall`` at 1, 4 and 8,
        ``latency_ms`` of a whole lookup (embedding included), and for the dense ones
        ``search_ms`` without the embedding. A donor that shares a rank with others counts as
        found where the index put it.

    Raises:
        ConfigError: a file cannot be read or holds no such lines; `index_dir` is in use.
        IndexUnavailableError: Milvus Lite failed.
    """
    database = index_dir / "lookup.db"
    if database.exists():
        raise ConfigError(f"{database} exists: give a folder without one")
    pairs = read_pairs(pairs_path, limit_pairs)
    if any(not isinstance(pair[side], str) for pair in pairs for side in ("donor", "target")):
        raise ConfigError(f"{pairs_path}: lookup is measured on pairs of plain texts")
    donors, targets = [pair["donor"] for pair in pairs], [pair["target"] for pair in pairs]
    texts = [*_others(pool_path, {*donors, *targets}, limit_pool), *donors]
    # In the order of arrival the donors would all be the newest, which an index may prefer.
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    stored = [texts[i] for i in order]
    place = {original: node for node, original in enumerate(order)}
    wanted = [str(place[len(texts) - len(donors) + i]) for i in range(len(donors))]

    with Progress(disable=not progress) as bar:
        task = bar.add_task("embedding", total=len(stored))
        records: list[IndexRecord] = []
        for start in range(0, len(stored), _EMBED_BATCH):
            batch = stored[start : start + _EMBED_BATCH]
            for text, vector in zip(batch, embedder.embed(batch), strict=True):
                keys = np.array(tokenizer_encode(text), dtype=np.uint64)
                records.append(IndexRecord(str(len(records)), _NAMESPACE, keys, vector))
            bar.advance(task, len(batch))
        lexical = LexicalIndex()
        milvus = MilvusIndex(str(database), embedder.dim, embedder.name, flush_every)
        try:
            build = {"lexical": _insert(lexical, records), "milvus": _insert(milvus, records)}
            milvus.wait_ready()
            methods = _search(lexical, milvus, tokenizer_encode, embedder, targets, wanted, bar)
        finally:
            milvus.close()
    return {
        "records": len(records),
        "pairs": len(pairs),
        "tokens": {"median": float(np.median([len(record.keys) for record in records]))},
        "embedder": embedder.name,
        "build_s": build,
        "methods": methods,
    }


def _others(path: Path, excluded: set[str], limit: int) -> list[str]:
    return [text for text in dict.fromkeys(read_prompts(path)) if text not in excluded][:limit]


def _insert(index: LexicalIndex | MilvusIndex, records: Sequence[IndexRecord]) -> float:
    start = time.perf_counter()
    # One by one, as a server stores them.
    for record in records:
        index.add([record])
    return time.perf_counter() - start


def _search(
    lexical: LexicalIndex,
    milvus: MilvusIndex,
    tokenizer_encode: Callable[[str], list[int]],
    embedder: Embedder,
    targets: Sequence[str],
    wanted: Sequence[str],
    bar: Progress,
) -> dict[str, Any]:
    most = max(_RANKS)
    names = ("lexical", "milvus_sparse", "milvus_dense", "hybrid")
    ranks: dict[str, list[int]] = {name: [] for name in names}
    total: dict[str, list[float]] = {name: [] for name in names}
    search: dict[str, list[float]] = {"milvus_dense": [], "hybrid": []}
    task = bar.add_task("looking up", total=len(targets))
    for target, donor in zip(targets, wanted, strict=True):
        keys = np.array(tokenizer_encode(target), dtype=np.uint64)
        clock = [time.perf_counter()]
        by_words = lexical.search(_NAMESPACE, keys, most)
        clock.append(time.perf_counter())
        sparse = milvus.search_sparse(_NAMESPACE, keys, most)
        clock.append(time.perf_counter())
        vector = embedder.embed([target])[0]
        clock.append(time.perf_counter())
        dense = milvus.search_dense(_NAMESPACE, vector, most)
        clock.append(time.perf_counter())
        words_s, sparse_s, embed_s, dense_s = np.diff(clock).tolist()
        found = {
            "lexical": (by_words, words_s),
            "milvus_sparse": (sparse, sparse_s),
            "milvus_dense": (dense, embed_s + dense_s),
            "hybrid": (_fill(by_words, dense, most), words_s + embed_s + dense_s),
        }
        for name, (candidates, seconds) in found.items():
            ids = [candidate.node_id for candidate in candidates]
            ranks[name].append(ids.index(donor) if donor in ids else most)
            total[name].append(seconds)
        search["milvus_dense"].append(dense_s)
        search["hybrid"].append(words_s + dense_s)
        bar.advance(task)
    report: dict[str, Any] = {}
    for name in names:
        found_at = np.array(ranks[name])
        report[name] = {
            "recall": {str(rank): float((found_at < rank).mean()) for rank in _RANKS},
            "latency_ms": _percentiles(total[name]),
        }
        if name in search:
            report[name]["search_ms"] = _percentiles(search[name])
    return report


def _fill(first: Sequence[Candidate], then: Sequence[Candidate], most: int) -> list[Candidate]:
    known = {candidate.node_id for candidate in first}
    return [*first, *(c for c in then if c.node_id not in known)][:most]


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50": float(p50), "p99": float(p99)}
