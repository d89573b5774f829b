"""Administration of stored requests: list, inspect, pin, delete, clear."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from kvshare_mm.modalities.seen import SeenMedia
from kvshare_mm.node import Node
from kvshare_mm.reuse.calibration import FamilyReport
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.store.media import media_ids
from kvshare_mm.stream import MEDIA_BIT

_FOREVER_S = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class DonorInfo:
    """A stored request, without its content.

    Attributes:
        donor_id: unique id, as provenance names it.
        namespace: who may share it.
        num_tokens: its prompt and answer.
        num_owned: tokens whose KV it holds itself; the others belong to its relatives.
        exact_len: leading tokens that equal a full prefill.
        parent: the request it was edited from, or None.
        depth: its ancestors, counted.
        tier: the fastest tier that holds it; None if it is being stored or dropped just now.
        created_s: seconds since the epoch.
        pinned_s: seconds that an administrator still keeps it from eviction; 0: not at all.
        num_media_tokens: tokens that are pictures or sound.
    """

    donor_id: str
    namespace: str
    num_tokens: int
    num_owned: int
    exact_len: int
    parent: str | None
    depth: int
    tier: Literal["host", "disk"] | None
    created_s: float
    pinned_s: float
    num_media_tokens: int


class CacheAdmin:
    """What an administrator may ask of the donors. Thread-safe.

    Args:
        donors: the pool.
        tokenizer: turns tokens back into text.
        seen: media remembered for showing, or None.
    """

    def __init__(
        self,
        donors: DonorPool,
        tokenizer: PreTrainedTokenizerBase,
        seen: SeenMedia | None = None,
    ) -> None:
        self._donors = donors
        self._seen = seen
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._pins: dict[str, float] = {}

    def families(self, namespace: str | None = None) -> list[FamilyReport]:
        """What audits found, by family, those audited most first; empty where nobody audits."""
        calibration = self._donors.reuse.calibration
        found = [] if calibration is None else calibration.report()
        wanted = [f for f in found if namespace is None or f.namespace == namespace]
        return sorted(wanted, key=lambda family: -family.audits)

    def save_calibration(self, path: Path) -> None:
        """Write what audits taught, for `calibration` of another server. Raises OSError."""
        if self._donors.reuse.calibration is not None:
            self._donors.reuse.calibration.save(path)

    def list(self, namespace: str | None = None) -> list[DonorInfo]:
        """All donors, or those of a namespace, the newest first."""
        nodes = self._donors.nodes()
        depths = _depths(nodes)
        pins = self._pinned()
        return [
            self._info(node, depths, pins.get(node.node_id, 0.0))
            for node in sorted(nodes, key=lambda n: -n.created_s)
            if namespace is None or node.namespace == namespace
        ]

    def get(self, donor_id: str) -> DonorInfo | None:
        """One donor, or None if there is none of this id."""
        return next((info for info in self.list() if info.donor_id == donor_id), None)

    def text(self, donor_id: str) -> str | None:
        """What a donor's request and answer say; every picture or clip is one mark."""
        node = next((n for n in self._donors.nodes() if n.node_id == donor_id), None)
        if node is None:
            return None
        parts: list[str] = []
        ids: list[int] = []
        in_media = False
        for key in (int(k) for k in node.align_keys):
            if key & MEDIA_BIT:
                if not in_media:
                    parts += [str(self._tokenizer.decode(ids)), "[media]"]
                    ids = []
                in_media = True
            else:
                ids.append(key)
                in_media = False
        return "".join([*parts, str(self._tokenizer.decode(ids))])

    def pin(self, donor_id: str, ttl_s: float) -> bool:
        """Keep a donor from eviction for `ttl_s` seconds from now; False: there is none."""
        if self.get(donor_id) is None:
            return False
        with self._lock:
            # Not by `unpin`, which lets go of the lock: two pins at once would both be entered in
            # the store, and one of them here, which is all that can be undone.
            if self._pins.pop(donor_id, None) is not None:
                self._donors.store.unpin(donor_id)
            self._donors.store.pin(donor_id, min(ttl_s, _FOREVER_S))
            self._pins[donor_id] = time.monotonic() + ttl_s
        return True

    def unpin(self, donor_id: str) -> bool:
        """Undo `pin`; False: the donor was not pinned."""
        with self._lock:
            until = self._pins.pop(donor_id, None)
            if until is None:
                return False
            self._donors.store.unpin(donor_id)
            return until > time.monotonic()

    def delete(self, donor_id: str) -> bool:
        """Delete a donor from all tiers, pinned or not; False: there is none."""
        if self.get(donor_id) is None:
            return False
        self.unpin(donor_id)
        self._donors.delete(donor_id)
        return True

    def clear(self, namespace: str | None = None) -> int:
        """Delete all donors, or those of a namespace; how many."""
        # What was made of pictures and sound goes too: it is as much of a request as its KV.
        for node_id in media_ids(self._donors.store, namespace):
            self._donors.store.delete(node_id)
        self._donors.states.clear(namespace)
        if self._seen is not None:
            self._seen.forget(namespace)
        # Donors are taken up while this runs: it deletes what it finds at its start.
        return sum(self.delete(info.donor_id) for info in self.list(namespace))

    def _pinned(self) -> dict[str, float]:
        now = time.monotonic()
        with self._lock:
            self._pins = {held: until for held, until in self._pins.items() if until > now}
            return {held: until - now for held, until in self._pins.items()}

    def _info(self, node: Node, depths: dict[str, int], pinned_s: float) -> DonorInfo:
        return DonorInfo(
            donor_id=node.node_id,
            namespace=node.namespace,
            num_tokens=len(node),
            num_owned=node.num_owned,
            exact_len=node.exact_len,
            parent=node.parent if node.parent in depths else None,
            depth=depths[node.node_id],
            tier=self._donors.store.resident(node.node_id),
            created_s=node.created_s,
            pinned_s=pinned_s,
            num_media_tokens=int((node.wide_keys >> 63).sum()),
        )


def _depths(nodes: list[Node]) -> dict[str, int]:
    parents = {node.node_id: node.parent for node in nodes}
    depths: dict[str, int] = {}
    for node in nodes:
        path = []
        at: str | None = node.node_id
        while at is not None and at in parents and at not in depths:
            path.append(at)
            at = parents[at]
        depth = depths[at] + 1 if at is not None and at in depths else 0
        for node_id in reversed(path):
            depths[node_id] = depth
            depth += 1
    return depths
