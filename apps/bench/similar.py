"""The paper's "-Similar" sets: prompts that have a near-identical partner (arXiv 2503.16525)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from kvshare_mm.errors import ConfigError

MAX_DISTANCE = 0.05
_BATCH = 32


def have_partner(
    embeddings: NDArray[np.float32], max_distance: float = MAX_DISTANCE, block: int = 1024
) -> NDArray[np.bool_]:
    """Which prompts have another one within a cosine distance.

    The paper embeds with GTE; give identical prompts once, or each is the other's partner.

    Args:
        embeddings: ``[N, dim]``, rows of unit length.
        max_distance: 1 minus the cosine, at most.
        block: prompts compared with all others at a time.

    Returns:
        ``[N]`` mask.
    """
    found = np.zeros(len(embeddings), dtype=bool)
    for start in range(0, len(embeddings), block):
        cosine = embeddings[start : start + block] @ embeddings.T
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -1  # a prompt is not its own partner
        found[start : start + block] = cosine.max(axis=1) >= 1 - max_distance
    return found


def nearest_before(embeddings: NDArray[np.float32], at: int, pool: int) -> float:
    """The cosine of prompt `at` to the nearest of the `pool` prompts before it; -1 if none."""
    before = embeddings[max(0, at - pool) : at]
    return float((before @ embeddings[at]).max()) if len(before) else -1.0


def embedded(
    texts: list[str], embedder: str, similar_only: bool
) -> tuple[list[str], NDArray[np.float32]]:
    """Prompts with their embeddings, ``[N, dim]``; only those with a partner, if asked for.

    Raises:
        ConfigError: none is left.
    """
    from kvshare_mm.modalities.embed import TextEmbedder

    texts = list(dict.fromkeys(texts)) if similar_only else texts
    model = TextEmbedder(embedder)
    batches = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
    found = np.concatenate([model.embed(b) for b in track(batches, "Embedding", transient=True)])
    if similar_only:
        mask = have_partner(found)
        if mask.sum() < 2:
            raise ConfigError("no prompts are left: none has a near-identical partner")
        texts, found = [t for t, kept in zip(texts, mask, strict=True) if kept], found[mask]
    return texts, found
