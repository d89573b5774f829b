"""`docs/models.md` says what the tests ran."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from kvshare_mm.models.support import windows

from ..conftest import RANDOM_MODELS
from .test_states import CONTINUED, WHOLE
from .test_support import SHAPE, SUPPORTED, UNSUPPORTED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

# CI also runs the tests against the installed wheel, from a copy without the pages.
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no source tree beside the tests")


def types() -> str:
    """The table of every type of model that the tests run."""
    rows: dict[str, str] = {}
    for name, (kind, options, _) in SUPPORTED.items():
        config = AutoConfig.for_model(kind, **{**SHAPE, **options})
        # Declined there are windows in every layer, as `vllm.gate` says, and latents that vLLM
        # keeps as keys whose last channels turn.
        whole = "full_attention" in (getattr(config, "layer_types", None) or ())
        special = kind == "minicpm3" or (windows(config) and not whole)
        words = name.partition(" (")[2].rstrip(")")
        inside = "declined" if special else "similar" if kind in RANDOM_MODELS else "not run"
        rows.setdefault(kind, f"| {words} | similar | {inside} |")
    for name, (kind, *_) in {**CONTINUED, **WHOLE, **UNSUPPORTED}.items():
        words = name.partition(" (")[2].rstrip(")")
        natively = "exact" if name in CONTINUED else "declined"
        rows.setdefault(kind, f"| {words} | {natively} | declined |")
    head = ["| model type | what is special | natively | inside vLLM |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| `{kind}` {row}" for kind, row in sorted(rows.items()))])


def test_every_type_of_model_stands_there() -> None:
    assert types() in PAGE.read_text("utf-8")


def test_bytes_of_kv_are_those_of_their_shapes() -> None:
    row = r"\| (\d+) x (\d+) x (\d+) \| ([\d,]+) \| ([\d,]+) \|"
    rows = re.findall(row, PAGE.read_text("utf-8"))
    assert len(rows) > 20
    for layers, heads, channels, size, tokens in rows:
        want = 2 * int(layers) * int(heads) * int(channels)
        assert (size, tokens) == (f"{want:,}", f"{(1 << 30) // want:,}")
