"""This project's default repair policy."""

from kvshare_mm.apps.bench.methods.base import Method

KVSHARE = Method(
    "kvshare",
    "this project's default policy",
    "on",
    None,
    ("auto:0.1", "auto:0.03", "auto:0.01", "auto:0.003", "auto:0.001"),
)
