"""The README's lines for users of vLLM, as they stand there, with a model that is here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvshare_mm.models.loader import locate

pytestmark = pytest.mark.vllm

_README = Path(__file__).parents[2] / "README.md"
_TIMEOUT_S = 600
_RULES = "Flat tyres are mended while customers wait, for 15 euros. " + " ".join(
    f"Bicycle number {n} costs {3 * n + 17} euros a week, with a helmet." for n in range(12)
)


@pytest.mark.skipif(not _README.is_file(), reason="no source tree beside the tests")
def test_the_example_reuses_behind_the_clock(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", _README.read_text("utf-8"), re.M | re.S)
    [example] = [code for code in blocks if "from vllm import" in code]
    assert len(example.splitlines()) <= 20
    # A small model, and no more memory and time than it takes.
    here = f'LLM("{locate("smollm2")}", enforce_eager=True, kv_cache_memory_bytes=1 << 28, '
    changed, count = re.subn(r'LLM\("[^"]+", ', here, example)
    assert count == 1
    # On a busy machine the donor may be stored late: it is waited for.
    patient = changed.replace(
        "kv_transfer_config()", 'kv_transfer_config({"lookup_deadline_s": 30})'
    )
    assert patient != changed
    (tmp_path / "example.py").write_text(patient, "utf-8")
    (tmp_path / "rules.txt").write_text(_RULES, "utf-8")
    ran = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = [line for line in ran.stdout.splitlines() if "'recomputed'" in line]
    first, second = (int(re.findall(r"'recomputed': (\d+)", line)[0]) for line in told)
    assert second < first / 2, told
