"""EPIC (arXiv 2410.15332): the first positions of every reused run are recomputed."""

from kvshare_mm.apps.bench.methods.base import Method

EPIC = Method(
    "epic",
    "EPIC (2410.15332): first 16 tokens of every kept run",
    "on",
    "window:16",
    tuple(f"window:{width}" for width in (2, 4, 8, 16, 32, 64)),
)
