"""Repair policies that are here to be compared with: what others have published or ship.

The product's decide from the plan alone. These may know more of the request at hand: what a forward
over its slot tells, and where its sentences end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvshare_mm.reuse.align import common_prefix
from kvshare_mm.reuse.divergence import fronts
from kvshare_mm.reuse.plan import Decline, KeptRun, ReusePlan, Tolerance
from kvshare_mm.reuse.repair import RepairPolicy, Tail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Quotes and brackets may stand behind them.
_SENTENCE_ENDS = tuple(".!?。")


@dataclass(frozen=True, slots=True)
class AtHand:
    """What can be known of a request beyond its plan.

    Attributes:
        drift: a plan and a layer -> ``[num_tokens]`` float32: how far V of each position is from
            what the new context gives; 0 where nothing is approximate.
        attention: a plan and a number of positions at the prompt's end -> ``[num_tokens]`` float32:
            how much those look at each, computed over what the plan reuses.
        endings: -> ``[num_tokens]`` bool: tokens that end a line or a sentence.
    """

    drift: Callable[[ReusePlan, int], np.ndarray]
    attention: Callable[[ReusePlan, int], np.ndarray]
    endings: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class TopDeviation:
    """The `share` of approximate positions whose V drifted most at an early layer.

    CacheBlend's choice (arXiv 2405.16444) with one selection layer, as its code makes it, and the
    prompt's last `tail` positions on top.
    """

    request: AtHand
    share: float = 0.15
    layer: int = 1
    tail: int = 8
    tolerance: ClassVar[Tolerance] = Tail.tolerance

    def __post_init__(self) -> None:
        _check_share(self.share)

    def positions(self, plan: ReusePlan) -> np.ndarray:
        found = _top(plan.approximate, self.share, lambda: self.request.drift(plan, self.layer))
        return np.concatenate((found, Tail(self.tail).positions(plan)))


@dataclass(frozen=True, slots=True)
class Narrowing:
    """CacheBlend as published: see `narrowing`, which carries it out.

    The plan alone tells what runs through all layers in any case: the prompt's last `tail`
    positions. The paper computes a little more than `share` of the others at the early layers and
    a little less at the late ones; here 1.2 times falls evenly to 0.8 times.
    """

    share: float = 0.15
    tail: int = 8
    tolerance: ClassVar[Tolerance] = Tail.tolerance

    def __post_init__(self) -> None:
        _check_share(self.share)

    def positions(self, plan: ReusePlan) -> np.ndarray:
        return Tail(self.tail).positions(plan)

    def counts(self, num_layers: int, most: int) -> Iterator[int]:
        """How many of `most` positions each layer computes: all in the first two, whose V is the
        first that another context changes."""
        shares = np.linspace(1.2, 0.8, max(0, num_layers - 2)) * self.share
        yield from [most] * min(2, num_layers)
        yield from (min(most, math.ceil(share * most)) for share in shares.tolist())


@dataclass(frozen=True, slots=True)
class TopAttended:
    """The `share` of approximate positions that the prompt's question looks at most.

    ProphetKV's choice (arXiv 2602.02579). The question is the prompt's last `query` positions: they
    run over the edited KV as a probe, and are computed again over what is repaired.
    """

    request: AtHand
    share: float = 0.2
    query: int = 32
    tolerance: ClassVar[Tolerance] = Tail.tolerance

    def __post_init__(self) -> None:
        _check_share(self.share)

    def positions(self, plan: ReusePlan) -> np.ndarray:
        query = Tail(self.query).positions(plan)
        before = plan.approximate
        before[query] = False
        found = _top(before, self.share, lambda: self.request.attention(plan, self.query))
        return np.concatenate((found, query))


@dataclass(frozen=True, slots=True)
class ToBoundary:
    """What stands behind every edit, to the end of the line or sentence, `most` positions at most.

    One of the contiguous repairs of arXiv 2609.17983.
    """

    request: AtHand
    most: int = 64
    tolerance: ClassVar[Tolerance] = Tail.tolerance

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"at most {self.most} positions are none")

    def positions(self, plan: ReusePlan) -> np.ndarray:
        ends = self.request.endings()
        if plan.joined is not None:  # the point of 3.5 ends nothing
            ends = ends & ~np.append(plan.joined[1:], False)
        behind = np.isin([run.start for run in plan.runs], fronts(plan, 1))
        found = [np.empty(0, np.int64)]
        for run, edited in zip(plan.runs, behind, strict=True):
            if edited:
                stop = min(run.end, run.start + self.most)
                length = int(np.argmax(np.append(ends[run.start : stop - 1], True))) + 1
                found.append(np.arange(run.start, run.start + length))
        return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class EarlierChunks:
    """Chunks of `least` tokens or more that follow the common prefix, and nothing else.

    What llama.cpp's server does with ``--cache-reuse N`` (its pull request #9866): a chunk that
    stands later in the old prompt moves to where the new one goes on, as often as there is one, and
    nothing in it is computed again. The first token that no chunk begins with ends that.
    """

    least: int = 256
    tolerance: ClassVar[Tolerance] = Tolerance()

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ValueError(f"chunks of {self.least} positions are none")

    def positions(self, plan: ReusePlan) -> np.ndarray:
        return np.empty(0, np.int64)

    def plan(self, target: np.ndarray, donor_id: str, donor: np.ndarray) -> ReusePlan:
        """The plan of a target instead of the planner's; both are uint64 keys, the donor exact."""
        end = head = common_prefix(donor, target[:-1])
        runs = [KeptRun(donor_id, 0, 0, end, exact=True)] if end else []
        while head < len(donor) and end < len(target) - 1:
            same = common_prefix(donor[head:], target[end:-1])
            if same >= self.least:
                runs.append(KeptRun(donor_id, head, end, same, exact=False))
                end += same
            head += same if same >= self.least else 1
        found = any(not run.exact for run in runs)
        declined = None if found else Decline.BELOW_MIN_GAIN
        return ReusePlan(len(target), tuple(runs), declined=declined)


def endings(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> np.ndarray:
    """``[N]`` bool: the tokens of a prompt that end a line or, followed by a space, a sentence."""
    ids, where = np.unique(token_ids, return_inverse=True)
    texts = (str(tokenizer.decode([int(token_id)])) for token_id in ids)
    ends = ["\n" in text or text.rstrip(" \"')]”").endswith(_SENTENCE_ENDS) for text in texts]
    return np.array(ends, dtype=bool)[where]


def bench_policies(request: AtHand) -> Mapping[str, Callable[[str], RepairPolicy]]:
    """These policies, as `make_policy` takes them beside the product's."""
    return {
        "deviation": lambda share: TopDeviation(request, float(share or 0.15)),
        "narrowing": lambda share: Narrowing(float(share or 0.15)),
        "prophet": lambda share: TopAttended(request, float(share or 0.2)),
        "boundary": lambda most: ToBoundary(request, int(most or 64)),
        "earlier": lambda least: EarlierChunks(int(least or 256)),
    }


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1, not {share}")


def _top(among: np.ndarray, share: float, measure: Callable[[], np.ndarray]) -> np.ndarray:
    """Of the positions `among` (``[num_tokens]`` bool) the share that measures most."""
    candidates = np.flatnonzero(among)
    count = math.ceil(share * len(candidates))
    if not count:
        return candidates[:0]
    return candidates[np.argpartition(-measure()[candidates], count - 1)[:count]]
