"""KVShare as first published (arXiv 2503.16525 v1): only what has no donor KV is computed."""

from kvshare_mm.apps.bench.methods.base import Method

PLACEHOLDERS = Method(
    "placeholders", "KVShare v1 (arXiv 2503.16525): nothing repaired", "on", "none"
)
