"""Tables of results by kind, for the terminal, the report and the README."""

from __future__ import annotations

from kvshare_mm.apps.bench.tables.base import Kind, Rows
from kvshare_mm.apps.bench.tables.cost import COST
from kvshare_mm.apps.bench.tables.fidelity import FIDELITY
from kvshare_mm.apps.bench.tables.media import MEDIA
from kvshare_mm.apps.bench.tables.serving import SERVING
from kvshare_mm.apps.bench.tables.vllm import VLLM

__all__ = ["TABLES", "Kind", "Rows"]

TABLES: dict[str, Kind] = {**FIDELITY, **COST, **MEDIA, **SERVING, **VLLM}
