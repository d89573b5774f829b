"""What whoever holds the KV tells of it to who decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvshare_mm.node import Node

# Why a finished request did not become a donor.
NotSaved = Literal["failed", "too_large"]


@dataclass(slots=True)
class Report:
    """What happened to stored KV, at one holder or at all of them together.

    Attributes:
        stored: holders that have taken a node up, by its id.
        attention: sum over them of what the node's last prompt position looked at.
        not_saved: why a node was not taken up, by its id.
        gone: nodes that a holder has no longer.
        restored: nodes that were found on disk at the start, as each holder has them.
    """

    stored: dict[str, int] = field(default_factory=dict)
    attention: dict[str, np.ndarray] = field(default_factory=dict)
    not_saved: dict[str, NotSaved] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    restored: list[Node] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take up what another holder tells."""
        for node_id, holders in other.stored.items():
            self.stored[node_id] = self.stored.get(node_id, 0) + holders
        for node_id, mass in other.attention.items():
            known = self.attention.get(node_id)
            self.attention[node_id] = mass if known is None else known + mass
        self.not_saved.update(other.not_saved)
        self.gone |= other.gone
        self.restored += other.restored

    @property
    def empty(self) -> bool:
        return not (self.stored or self.not_saved or self.gone or self.restored)
