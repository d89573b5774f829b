"""This project's default repair policy."""

from kvshare_mm.apps.bench.methods.base import Method

KVSHARE = Method(
    "kvshare",
    "this project's default policy",
    "on",
    None,
    ("auto:0.25", "auto:0.5", "auto:1.0", "auto:2.0", "auto:4.0"),
)
