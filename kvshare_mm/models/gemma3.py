"""Gemma 3 (arXiv 2503.19786): text and pictures, whose positions see each other."""

from __future__ import annotations

from kvshare_mm.models.qwen2_vl import Qwen2VL


class Gemma3(Qwen2VL):
    """A loaded ``Gemma3ForConditionalGeneration``; a picture takes ``mm_tokens_per_image``."""

    mrope = False
    both_ways = True
