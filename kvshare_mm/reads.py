"""Which earlier positions a prompt's tokens look back on, far away: who has read what.

A few heads of every language model look up what stands somewhere before: they attend to the token
behind an earlier mention of what is before them (induction and retrieval heads, arXiv 2209.11895,
2404.15574). What such a head reads at a position is in that position's KV from then on. So whoever
has read a value must be computed again when the value is edited, however far behind it stands.

Most of this tells how a text goes on that repeats itself: the frame of the next turn, the labels of
the next form. What was read there stands there as well, so that nobody needs to have read it; those
reads are left out (see `telling`).

Heads are found once, with a forward over random tokens that repeat themselves, and watched when a
prompt is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from kvshare_mm.attention import Recorder
from kvshare_mm.kernels.scoring import PLAIN, Scoring

Heads = Mapping[int, tuple[int, ...]]
"""Numbers of query heads by layer."""

# What is nearer is the same phrase: its end is repaired with the edit.
NEAR = 4
# Of a head's attention: less is no reading.
LEAST = 0.3
# Heads that are watched, those first that look up most: in all, and of one layer, whose heads look
# up much the same. Each costs its scores.
_MOST_HEADS, _MOST_OF_LAYER = 6, 2
_LEAST_INDUCTION = 0.2
# Random tokens of the probe, twice.
PROBE = 64
# Scores that are held at a time: what a CPU's cache holds, or a GPU does in one launch.
_SCORES_CPU, _SCORES_GPU = 1 << 18, 1 << 26


class Reads:
    """Records which far positions the computed rows of one prompt read.

    Args:
        heads: those to be watched.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._found: list[torch.Tensor] = []

    def add(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        index: torch.Tensor,
        scale: float,
        scoring: Scoring = PLAIN,
    ) -> None:
        """Take up one layer's attention, if a head of it is watched.

        Args:
            query: ``[num_heads, n, head_dim]``.
            key: ``[num_kv_heads, N, head_dim]``.
            index: ``[n]`` token index of each row, below N.
            scale: factor on the scores.
            scoring: what the layer does beyond; one that does not see all before reads nothing far.
        """
        if layer not in self._heads or scoring.span != (0, 0) or not len(index):
            return
        heads = list(self._heads[layer])
        own = query[heads] * scale
        keys = key[[head * len(key) // len(query) for head in heads]].transpose(1, 2)
        sinks = None if scoring.sinks is None else scoring.sinks[heads]
        most = _SCORES_CPU if key.device.type == "cpu" else _SCORES_GPU
        at_once = most // (len(heads) * key.shape[1])
        for rows in torch.arange(len(index), device=index.device).split(max(1, at_once)):
            here = index[rows]
            last = int(here[-1]) + 1
            if last <= NEAR + 1:
                continue
            scores = _scores(own[:, rows], keys[..., :last], here, scoring)
            enough = _whole(scores, sinks) + math.log(LEAST)
            # The first token is where heads look that look for nothing.
            row, read = (scores[..., 1 : last - NEAR] >= enough).any(0).nonzero(as_tuple=True)
            reader, read = here[row].long(), read + 1
            far = read <= reader - NEAR
            self._found.append(torch.stack((reader[far], read[far]), dim=1))

    def pairs(self, keys: np.ndarray) -> np.ndarray:
        """``[R, 2]`` int32: a position and one that it reads, each pair once, ascending; those that
        are `telling` in a prompt of these ``[N]`` uint64 keys."""
        if not self._found:
            return np.empty((0, 2), np.int32)
        found = torch.cat(self._found)
        each = (found[:, 0] << 32 | found[:, 1]).unique()
        both = torch.stack((each >> 32, each & 0xFFFFFFFF), dim=1).to("cpu", torch.int32)
        pairs = both.numpy()
        told: np.ndarray = pairs[telling(pairs, keys)]
        return told


def telling(pairs: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``[R]`` bool: which of `pairs` (``[R, 2]``: a position and an earlier one that it reads, not
    the first) tell what is not said where they are read.

    Those do not that read the reader's own token or the one behind it, or what followed the
    reader's token when it was said before: what follows it now stands there, the same or another.

    Args:
        keys: ``[N]`` of the prompt.
    """
    reader, read = pairs.T
    own = keys[reader]
    behind = np.minimum(reader + 1, len(keys) - 1)
    found: np.ndarray = own != keys[read]
    found &= own != keys[read - 1]
    found &= (keys[behind] != keys[read]) | (behind == reader)
    return found


def _scores(
    query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """``[h, n, N]`` float32 scores of scaled queries ``[h, n, d]`` over ``[h, d, N]`` keys."""
    scores = torch.matmul(query, key).float()
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    first = int(index[0])  # what is before is seen by all rows
    tokens = torch.arange(first, key.shape[2], device=key.device)
    scores[..., first:].masked_fill_(tokens > index[:, None], float("-inf"))
    return scores


def _whole(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """``[h, n, 1]``: the logarithm of what attention is a share of; `sinks` are ``[h]``."""
    whole = scores.logsumexp(-1, keepdim=True)
    return whole if sinks is None else torch.logaddexp(whole, sinks[:, None, None].float())


def reading_heads(probe: Callable[[torch.Tensor, Recorder], None], vocab_size: int) -> Heads:
    """The heads of a model that look up what stands before; none if it has none.

    Args:
        probe: runs a forward of the model over ``[n]`` token ids, with a recorder.
    """
    chosen = torch.Generator().manual_seed(0)
    low = vocab_size // 50
    ids = torch.randint(low, max(low + 1, vocab_size // 2), (PROBE,), generator=chosen)
    # How much of each head's attention goes to what followed the same token before.
    found: dict[int, torch.Tensor] = {}

    def record(
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        index: torch.Tensor,
        scale: float,
        scoring: Scoring,
    ) -> None:
        if scoring.span == (0, 0):
            keys = key.repeat_interleave(len(query) // len(key), 0).transpose(1, 2)
            scores = _scores(query * scale, keys, index, scoring)
            mass = (scores - _whole(scores, scoring.sinks)).exp()
            again = torch.arange(PROBE, 2 * PROBE - 1, device=key.device)
            found[layer] = mass[:, again, again - PROBE + 1].mean(1)

    probe(ids.repeat(2), record)
    scores = {
        (layer, head): score
        for layer, row in found.items()
        for head, score in enumerate(row.tolist())
        if score >= _LEAST_INDUCTION
    }
    best: dict[int, tuple[int, ...]] = {}
    for layer, head in sorted(scores, key=lambda at: -scores[at]):
        heads = best.get(layer, ())
        if len(heads) < _MOST_OF_LAYER and sum(map(len, best.values())) < _MOST_HEADS:
            best[layer] = (*heads, head)
    return best
