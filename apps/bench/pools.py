"""Pools of a bounded number of donors that a stream of prompts passes through."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.config import KVShareConfig
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.plan import PlannerOptions, ReusePlan
from kvshare_mm.reuse.repair import RepairPolicy, make_policy
from kvshare_mm.store.host import HostTier
from kvshare_mm.stream import SegmentStream

_PLENTY = 1 << 40


class StreamPool(Protocol):
    """Serves prompts one after the other, each from the last so many before it."""

    def admit(self, stream: SegmentStream) -> tuple[ReusePlan, float]:
        """Plan a prompt, then take it up: its plan, and seconds of lookup and planning."""

    def __len__(self) -> int:
        """Donors in the pool."""

    def close(self) -> None: ...


OpenPool = Callable[[int], StreamPool]


class PlannedPool:
    """The project's own pool, indexes, tree and planner; of KV it holds a byte a position.

    Nothing of a plan depends on what KV contains, so prompts are planned as in a server, and no
    model is needed.

    Args:
        size: donors kept; the oldest leaves first.
        options: the planner's.
        policy: repairs that are counted as computed; it must not ask for measurements, and knows
            nothing of where donors looked.
        whole: store every prompt as computed in full, as prefix caching does.
        max_candidates: donors aligned with a prompt.
    """

    def __init__(
        self,
        size: int,
        options: PlannerOptions,
        policy: RepairPolicy,
        *,
        whole: bool = False,
        max_candidates: int = 4,
    ) -> None:
        self._donors = DonorPool(
            "plan-only", KVEditor(None), HostTier(_PLENTY), max_candidates=max_candidates
        )
        self._options = options
        self._policy = policy
        self._whole = whole
        self._window = _Window(self._donors, size)
        self._kv = torch.zeros((1, 1, 1, 1), dtype=torch.uint8)

    def admit(self, stream: SegmentStream) -> tuple[ReusePlan, float]:
        found = self._donors.reuse.find(stream, "plan-only", self._options, self._policy)
        plan = found.plan
        stored = ReusePlan(len(stream)) if self._whole else plan
        kv = self._kv.expand(1, 1, len(stream), 1)
        self._window.add(self._donors.save(stream.align_keys, "plan-only", stored, kv, kv, ""))
        return plan, found.lookup + found.planning

    def __len__(self) -> int:
        return len(self._donors.tree)

    def close(self) -> None:
        self._donors.close()


class ServedPool:
    """Prompts prefilled by a model, repairs included.

    Args:
        rig: what serves them; its donors are this pool.
        size: donors kept; the oldest leaves first.
        method: how they are served; a rig has one pool of each.
    """

    def __init__(self, rig: Rig, size: int, method: Method) -> None:
        self._rig = rig
        self._method = method
        self._namespace = rig.namespace(f"pool-{method.name}")
        self._window = _Window(rig.donors, size)

    def admit(self, stream: SegmentStream) -> tuple[ReusePlan, float]:
        served = self._rig.serve(stream, self._namespace, self._method)
        self._window.add(self._rig.save(stream, self._namespace, served))
        return served.result.plan, served.result.lookup + served.result.planning

    def __len__(self) -> int:
        return len(self._window)

    def close(self) -> None:
        self._window.keep(0)


def planned(repair: str) -> dict[str, OpenPool]:
    """What opens pools that only plan, by method. Raises ConfigError: no such policy."""
    config, policy = KVShareConfig.of(repair=repair), make_policy(repair)
    exact = config.planner.but_exact_only()
    return {
        "prefix": lambda size: PlannedPool(size, exact, policy, whole=True),
        "kvshare": lambda size: PlannedPool(size, config.planner, policy),
    }


def served(rig: Rig) -> dict[str, OpenPool]:
    """What opens pools of prompts that the model prefills, by method."""
    return {
        "prefix": lambda size: ServedPool(rig, size, METHODS["prefix"]),
        "kvshare": lambda size: ServedPool(rig, size, METHODS["kvshare"]),
    }


class _Window:
    """The newest donors of a pool."""

    def __init__(self, donors: DonorPool, size: int) -> None:
        self._donors = donors
        self._size = size
        self._ids: deque[str] = deque()

    def add(self, node_id: str | None) -> None:
        if node_id is not None:
            self._ids.append(node_id)
        self.keep(self._size)

    def keep(self, size: int) -> None:
        while len(self._ids) > size:
            self._donors.delete(self._ids.popleft())

    def __len__(self) -> int:
        return len(self._ids)
