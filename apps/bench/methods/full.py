"""Full recompute: the measure of all others."""

from kvshare_mm.apps.bench.methods.base import Method

FULL = Method("full", "full recompute", "off")
