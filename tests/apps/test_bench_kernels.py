"""The kernel benchmark checks what it times, and says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvshare_mm.apps.bench.kernels import SHAPES, Shape, run
from kvshare_mm.kernels.backend import interpreting

from .conftest import Run

pytest.importorskip("triton")

_SHAPE = Shape("tiny", 4, 2, 16, 70, 12, 3)


def test_the_positions_are_as_many_as_it_says() -> None:
    assert _SHAPE.index.tolist() == [0, 1, 2, 22, 23, 24, 45, 46, 47, 67, 68, 69]
    assert Shape("tiny", 4, 2, 16, 70, 1, 1).index.tolist() == [69]
    for shape in (one for shapes in SHAPES.values() for one in shapes):
        assert len(set(shape.index.tolist())) == shape.num_computed
        assert shape.index[-1] == shape.num_tokens - 1


@pytest.mark.skipif(not interpreting(), reason="Triton needs a GPU here")
def test_every_method_computes_the_same() -> None:
    report = run(torch.device("cpu"), repeats=1, shapes=(_SHAPE,))
    rows = {row["method"]: row for row in report["attention"]}
    assert list(rows) == [
        "full attention, all positions", "sdpa, dense mask", "kvshare torch", "kvshare triton"
    ]  # fmt: skip
    for row in rows.values():
        assert row["ms"] > 0 and row["speedup"] > 0
        assert (row["max_abs_error"] or 0) < 1e-5
    assert [row["method"] for row in report["edit"]] == ["copy", "edit, torch", "edit, triton"]
    assert all(row["ms"] > 0 for row in report["edit"])


def test_the_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "cpu", (_SHAPE,))
    out = tmp_path / "report.json"
    done = run("bench", "kernels", "--device", "cpu", "--repeats", "1", "--json", out)
    assert done.exit_code == 0, done.output
    assert "kvshare torch" in done.output
    assert json.loads(out.read_text())["attention"][0]["num_tokens"] == 70
    refused = run("bench", "kernels", "--device", "tpu")
    assert refused.exit_code == 1 and "tpu" in refused.output
