"""Deviation behind edits: a short window after every edit, then the positions that drifted most.

The window catches what looks back on an edit for the price of no measurement; the deviation finds
the rest. It stands between EPIC and CacheBlend, and shows what either lacks.
"""

from kvshare_mm.apps.bench.methods.base import Method

DEVIATION = Method(
    "deviation",
    "window of 4 behind every edit and the top 15% V deviation",
    "on",
    "window:4+deviation:0.15",
    tuple(f"window:4+deviation:{share}" for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)),
)
