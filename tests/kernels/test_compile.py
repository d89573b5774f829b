"""The kernels compile for GPUs that are not here, without spills and within shared memory.

In a process of its own: this one interprets kernels, and Triton decides that once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvshare_mm.kernels.compile import TARGETS
from kvshare_mm.kernels.tiles import SHARED_BYTES, attention_tiles

_TIMEOUT_S = 1800  # the test may be paused; it takes half a minute


def _compile(target: str, out: Path, *options: str, interpret: str | None = None) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    command = [
        *(sys.executable, "-m", "kvshare_mm.apps.cli", "kernels", "compile"),
        *("--target", target, "--json", str(out), *options),
    ]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )


def _check(target: str, done: Any, out: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    kernels = report["kernels"]
    assert {k["name"].partition(" (")[0] for k in kernels} == {
        "partial_attention",
        "combine",
        "edit_kv",
    }
    for kernel in kernels:
        assert set(kernel) == {"name", "target", "registers", "spills", "shared_bytes"}
        assert kernel["target"] == target
        assert kernel["spills"] == 0, kernel
        assert 16 <= kernel["registers"] <= 255 + 257 * target.startswith("gfx"), kernel
        assert 0 <= kernel["shared_bytes"] <= SHARED_BYTES[target], kernel
    attention = [k for k in kernels if k["name"].startswith("partial_attention (bfloat16, dim 128")]
    assert any(k["shared_bytes"] > 16384 for k in attention), "nothing was read from the compiler"


def test_compile_for_hopper(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    _check("sm_90", _compile("sm_90", out), out)


@pytest.mark.e2e
@pytest.mark.parametrize("target", TARGETS)
def test_compile_every_tile(target: str, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    _check(target, _compile(target, out, "--all-tiles"), out)
    # What tiles are pruned by must not be less than what the compiler then takes.
    seen = {}
    for kernel in json.loads(out.read_text())["kernels"]:
        if kernel["name"].startswith("partial_attention (bfloat16"):
            _, dim, _, tile = kernel["name"].rstrip(")").split(", ")[:4]
            at = int(dim.split()[1]), tile.split()[1]
            seen[at] = max(seen.get(at, 0), kernel["shared_bytes"])
    for (dim, shape), shared_bytes in seen.items():
        bound = max(
            t.shared_bytes(dim, dim, 2)
            for t in attention_tiles(target, dim, dim, torch.bfloat16)
            if f"{t.block_m}x{t.block_n}" == shape
        )
        assert shared_bytes <= bound, (dim, shape)


@pytest.mark.parametrize(
    ("target", "interpret", "words"),
    [("sm_42", None, "sm_80, sm_90"), ("sm_90", "1", "unset it")],
)
def test_what_cannot_be_compiled_is_said(
    target: str, interpret: str | None, words: str, tmp_path: Path
) -> None:
    done = _compile(target, tmp_path / "kernels.json", interpret=interpret)
    assert done.returncode == 1
    assert "Error:" in done.stderr and words in done.stderr
    assert "Traceback" not in done.stderr
