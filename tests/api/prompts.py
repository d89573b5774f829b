"""What the tests of the Python API ask, and what they look at."""

from __future__ import annotations

from collections.abc import Callable

from kvshare_mm import KVShare, SamplingParams

OpenLLM = Callable[..., KVShare]

PATIENCE_S = 60
_PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(12))
_DONOR = f"Laboratory report. Patient number 48210. {_ROWS} Question: what is value 3?"
_TARGET = f"Laboratory report. Patient number 77. {_ROWS} Question: what is value 3?"
_CHAT = [
    {"role": "system", "content": "Answer with the number."},
    {"role": "user", "content": "What is the value?"},
]


def events(llm: KVShare) -> dict[str, int]:
    counts: dict[str, int] = llm.stats()["donors"]["events"]
    return counts
