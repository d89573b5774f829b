"""Prefix caching, as in vLLM and SGLang: the identical beginning is reused, exactly."""

from kvshare_mm.apps.bench.methods.base import Method

PREFIX = Method("prefix", "prefix caching: the identical beginning only", "exact")
