"""`kvshare bench lookup`: is the right donor found among thousands, and how fast?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.apps.bench.prompts import read_pairs, read_prompts
from kvshare_mm.errors import ConfigError
from kvshare_mm.index.base import Candidate, IndexRecord
from kvshare_mm.index.lexical import LexicalIndex
from kvshare_mm.index.milvus import MilvusIndex

if TYPE_CHECKING:
    from kvshare_mm.modalities.embed import TextEmbedder

Encode = Callable[[str], list[int]]

_NAMESPACE = "bench"
_RANKS = (1, 4, 8)
_MOST = max(_RANKS)
_EMBED_BATCH = 32


def run(
    pairs_path: Path,
    pool_path: Path,
    encode: Encode,
    embedder: TextEmbedder,
    index_dir: Path,
    limit_pool: int = 3000,
    *,
    limit_pairs: int | None = None,
    flush_every: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Hide every pair's donor among other prompts, then look for it with the pair's target.

    Args:
        pairs_path: JSON Lines of ``{"donor", "target"}``.
        pool_path: JSON Lines of ``{"text"}``: the other prompts. Those equal to a donor or a
            target are left out.
        encode: text to token ids, as the served model would get them.
        embedder: makes the vectors of the dense index.
        index_dir: folder for the Milvus Lite database; it must hold none yet.
        limit_pool: how many other prompts.
        limit_pairs: use the first so many pairs; None for all.
        flush_every: as in `MilvusIndex`.
        seed: of the order in which donors and others are stored.

    Returns:
        JSON-serialisable: ``records``, ``pairs``, ``build_s`` and, for each of ``methods``
        (``lexical``, ``milvus_dense``, ``hybrid``): ``recall`` at 1, 4 and 8, and ``latency_ms``
        of a whole lookup, embedding included. A donor that shares a rank with
        others counts as found where the index put it.

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
    known = {*donors, *targets}
    others = [text for text in dict.fromkeys(read_prompts(pool_path)) if text not in known]
    texts = [*others[:limit_pool], *donors]
    # In the order of arrival the donors would all be the newest, which an index may prefer.
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    place = {original: node for node, original in enumerate(order)}
    wanted = [str(place[len(texts) - len(donors) + i]) for i in range(len(donors))]
    records = list(_records([texts[i] for i in order], encode, embedder))
    lexical = LexicalIndex()
    milvus = MilvusIndex(str(database), embedder.dim, embedder.name, flush_every)
    try:
        build = {"lexical": _insert(lexical, records), "milvus": _insert(milvus, records)}
        milvus.wait_ready()
        methods = _search(lexical, milvus, encode, embedder, targets, wanted)
    finally:
        milvus.close()
    return {
        "kind": "lookup",
        "records": len(records),
        "pairs": len(pairs),
        "tokens": {"median": float(np.median([len(record.align_keys) for record in records]))},
        "embedder": embedder.name,
        "build_s": build,
        "methods": methods,
    }


def _records(texts: Sequence[str], encode: Encode, embedder: TextEmbedder) -> Iterator[IndexRecord]:
    for start in track(range(0, len(texts), _EMBED_BATCH), "Embedding", transient=True):
        batch = texts[start : start + _EMBED_BATCH]
        for i, (text, vector) in enumerate(zip(batch, embedder.embed(batch), strict=True), start):
            yield IndexRecord(str(i), _NAMESPACE, np.array(encode(text), dtype=np.uint64), vector)


def _insert(index: LexicalIndex | MilvusIndex, records: Sequence[IndexRecord]) -> float:
    start = time.perf_counter()
    # One by one, as a server stores them.
    for record in records:
        index.add([record])
    return time.perf_counter() - start


def _search(
    lexical: LexicalIndex,
    milvus: MilvusIndex,
    encode: Encode,
    embedder: TextEmbedder,
    targets: Sequence[str],
    wanted: Sequence[str],
) -> dict[str, Any]:
    names = ("lexical", "milvus_dense", "hybrid")
    ranks: dict[str, list[int]] = {name: [] for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    looked_up = track(targets, "Looking up", transient=True)
    for target, donor in zip(looked_up, wanted, strict=True):
        keys = np.array(encode(target), dtype=np.uint64)
        clock = [time.perf_counter()]
        by_words = lexical.search(_NAMESPACE, keys, _MOST)
        clock.append(time.perf_counter())
        dense = milvus.search_dense(_NAMESPACE, embedder.embed([target])[0], _MOST)
        clock.append(time.perf_counter())
        words_ms, dense_ms = (1000 * np.diff(clock)).tolist()
        found = {
            "lexical": (by_words, words_ms),
            "milvus_dense": (dense, dense_ms),
            "hybrid": (_fill(by_words, dense), words_ms + dense_ms),
        }
        for name, (candidates, ms) in found.items():
            ids = [candidate.node_id for candidate in candidates]
            ranks[name].append(ids.index(donor) if donor in ids else _MOST)
            spent[name].append(ms)
    return {
        name: {
            "recall": {str(r): float((np.array(ranks[name]) < r).mean()) for r in _RANKS},
            "latency_ms": spread(spent[name], 50, 99),
        }
        for name in names
    }


def _fill(first: Sequence[Candidate], then: Sequence[Candidate]) -> list[Candidate]:
    known = {candidate.node_id for candidate in first}
    return [*first, *(c for c in then if c.node_id not in known)][:_MOST]
