"""Whoever uses the package is told of mistakes by their type checker."""

from __future__ import annotations

import sys
from pathlib import Path

from mypy import api

_PROGRAM = """
from kvshare_mm import KVShare

with KVShare("smollm2", max_divergance=0.1) as llm:
    llm.generate("Hi", max_tokens="5")
    reveal_type(llm.chat([{"role": "user", "content": "Hi"}]))
"""
# Of the libraries that we use nothing is read: they take minutes.
_OPTIONS = """
[mypy]
follow_imports = skip
[mypy-kvshare_mm.*]
follow_imports = silent
"""


def test_mistakes_of_callers_are_told(tmp_path: Path) -> None:
    program, options = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(_PROGRAM)
    options.write_text(_OPTIONS)
    cache = ["--cache-dir", str(tmp_path / "cache")]
    told, failed, _ = api.run(
        [str(program), "--config-file", str(options), "--python-executable", sys.executable, *cache]
    )
    assert not failed
    assert 'did you mean "max_divergence"?' in told
    assert 'No overload variant of "generate"' in told
    assert 'Revealed type is "kvshare_mm.outputs.RequestOutput"' in told
