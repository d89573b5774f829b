"""The README's first example, as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

_README = Path(__file__).parents[1] / "README.md"
_TIMEOUT_S = 600  # the first run on a machine converts the model


def blocks(language: str) -> list[str]:
    """Code blocks of the README in this language ("": none named), in order."""
    parts = re.split(r"^```(\w*)\n", _README.read_text("utf-8"), flags=re.M)
    # Text, opening fence, code, closing fence, text, ...
    return [
        code for fence, code in zip(parts[1::4], parts[2::4], strict=False) if fence == language
    ]


def test_the_first_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(blocks("python")[0], "utf-8")
    ran = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
    # The lists of commands come first.
    said = next(b for b in blocks("") if "tokens computed" in b)
    assert ran.stdout == said
