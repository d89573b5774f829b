"""Similar requests that come together: the first is computed, and those like it wait for that.

A request becomes a donor when it is over. Those that come while its prompt is computed would all
be computed in full beside it, and each other. Here they are asked about again and again, as vLLM
does with whoever is not ready, until the prompt of the one before is computed and stored; its
answer goes on meanwhile. Only prompts that somebody waits for are stored before they are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvshare_mm.index.ngrams import overlap
from kvshare_mm.reuse.scheduler import ReuseScheduler
from kvshare_mm.vllm.lookup import Lookup
from kvshare_mm.vllm.meta import Save
from kvshare_mm.vllm.saving import Saving

# What waiting has to bring: so many tokens, and such a share of a prompt.
_LEAST_TOKENS, _LEAST_SHARE = 64, 0.25
# A request waits while others compute so many prompts of its length, and no longer.
_MOST_PROMPTS = 2
# Plans are made one after the other: of those that waited so many are looked up at once, or the
# last would be late.
_AT_ONCE = 8


class Bursts:
    """Lives in the scheduler side.

    Args:
        lookups: requests by id.
        reuse: the donors.
    """

    def __init__(self, lookups: Mapping[str, Lookup], reuse: ReuseScheduler) -> None:
        self._lookups = lookups
        self._reuse = reuse
        self._computed = 0
        self._ended = False

    def end(self) -> None:
        """From now on nobody waits, and nothing is stored."""
        self._ended = True

    def hold(self, lookup: Lookup, local: int) -> bool:
        """Whether a request, whose plan is there, waits for one before it from now on.

        Args:
            local: tokens of it in vLLM's own prefix cache.
        """
        if self._ended or lookup.has_waited or lookup.exact:
            return False
        if lookup.sketch is None or lookup.stream is None:
            return False
        lookup.has_waited = True
        n, plan = len(lookup.stream), lookup.plan
        kept = 0 if plan is None else n - plan.num_computed
        # Where a donor has as much and little of it is kept, so it would be of another.
        found = max(local, kept, n * lookup.overlap)
        best, most = None, found + max(_LEAST_TOKENS, _LEAST_SHARE * n)
        for request_id, other in self._lookups.items():
            if other.namespace != lookup.namespace or not self._runs(other):
                continue
            assert other.sketch is not None
            shared = n * overlap(lookup.sketch, other.sketch)
            if shared > most:
                best, most = request_id, shared
        if best is None:
            return False
        lookup.behind, lookup.held_at = best, self._computed
        self._lookups[best].wanted = True
        return True

    @staticmethod
    def _runs(other: Lookup) -> bool:
        """Whether a request has begun, so that it waits for nobody, and may become a donor."""
        return other.local is not None and other.sketch is not None and other.options.store

    def waits(self, lookup: Lookup) -> bool:
        """Whether a request that was held still waits; else it is looked up once more."""
        assert lookup.behind is not None and lookup.stream is not None
        other = self._lookups.get(lookup.behind)
        computed = self._computed - lookup.held_at
        if not self._ended and computed <= _MOST_PROMPTS * len(lookup.stream):
            saving = self._reuse.saving(lookup.namespace)
            if other is not None and (other.early is None or other.early in saving):
                return True
            if sum(x.is_planned for x in self._lookups.values()) >= _AT_ONCE:
                return True
        lookup.behind = None
        return False

    def stored(
        self,
        scheduled: Mapping[str, int],
        request_of: Callable[[str], Any],
        blocks_of: Callable[[str], list[int]],
        saving: Saving,
    ) -> Save | None:
        """A prompt that somebody waits for and that is computed when this step is over, to be
        stored in it: one a step, each costs a forward.

        Args:
            scheduled: tokens that the step computes, by request.
        """
        self._computed += sum(scheduled.values())
        if self._ended:
            return None
        for request_id, tokens in scheduled.items():
            lookup = self._lookups.get(request_id)
            if lookup is None or not lookup.wanted or lookup.early is not None:
                continue
            request = request_of(request_id)
            length = request.num_prompt_tokens
            if lookup.loading or request.num_computed_tokens + tokens < length:
                continue
            save = saving.keep(request, lookup, length, blocks_of(request_id), over=False)
            lookup.early = "" if save is None else save.node.node_id
            if save is not None:
                self._reuse.counters["saved_early"] += 1
                return save
        return None
