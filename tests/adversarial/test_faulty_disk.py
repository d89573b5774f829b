"""A disk that fails in every way while a server answers: answers are right, failures counted."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm import KVShare
from kvshare_mm.reuse import check
from kvshare_mm.store import codec

from .killed_server import prompt

_REQUESTS = 60


class Faults:
    """Which operations fail, how often. All that the store does to files goes through here."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rng = np.random.default_rng(7)
        self.chances: dict[str, float] = {}
        self.calls = 0
        patch.setattr(codec, "open", self._open, raising=False)
        for name in ("replace", "unlink", "utime"):
            patch.setattr(os, name, self._failing(name, getattr(os, name)))

    def happens(self, name: str) -> bool:
        return self.rng.random() < self.chances.get(name, 0)

    def raise_if(self, name: str, number: int = errno.EIO) -> None:
        if self.happens(name):
            raise OSError(number, os.strerror(number))

    def _failing(self, name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.raise_if(name)
            return real(*args, **options)

        return call

    def _open(self, path: Path, mode: str, **options: Any) -> Any:
        self.raise_if("open")
        raw = _Raw(path, mode.replace("b", ""), **options)
        raw.faults = self
        return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)


class _Raw(io.FileIO):
    faults: Faults

    def readinto(self, buffer: Any) -> int:
        faults = self.faults
        faults.raise_if("read")
        faults.calls += 1
        view = memoryview(buffer).cast("B")
        if faults.happens("short"):
            view = view[: int(faults.rng.integers(1, len(view) + 1))]
        count = super().readinto(view)
        if count and faults.happens("flip"):  # the sign of every second number, and more
            for at in range(int(faults.rng.integers(8)), count, 8):
                view[at] ^= 0x80
        return count

    def write(self, content: Any) -> int:
        self.faults.raise_if("write")
        self.faults.raise_if("full", errno.ENOSPC)
        if self.faults.happens("short"):
            content = memoryview(content).cast("B")[: int(self.faults.rng.integers(1, 5000))]
        return super().write(content)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def fresh(tiny_folder: Path) -> Iterator[KVShare]:
    with KVShare(str(tiny_folder), embedder=None, reuse="off", max_model_len=512) as llm:
        yield llm


@pytest.mark.parametrize(
    ("chances", "counted"),
    [
        ({"short": 0.9}, set()),
        ({"read": 0.3}, {"read_io_error"}),
        ({"open": 0.3}, {"read_io_error", "write_io_error"}),
        ({"flip": 0.3}, {"read_corrupt"}),
        ({"write": 0.3}, {"write_io_error"}),
        ({"full": 0.3}, {"write_io_error"}),
        ({"full": 1.0}, {"write_io_error"}),
        ({"replace": 0.3}, {"write_io_error"}),
        ({"unlink": 0.5, "utime": 0.5}, set()),
        ({"clock": 1.0}, set()),
        (
            dict.fromkeys(("read", "flip", "full", "replace", "unlink", "short", "clock"), 0.1),
            {"read_io_error", "read_corrupt", "write_io_error"},
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_no_answer_is_wrong_and_every_failure_is_counted(
    fresh: KVShare,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chances: dict[str, float],
    counted: set[str],
) -> None:
    rng = np.random.default_rng(3)
    faults = Faults(monkeypatch)
    now = time.time

    def clock() -> float:  # jumps up to a day back, or on
        return now() + float(rng.uniform(-86_400, 86_400)) * faults.happens("clock")

    monkeypatch.setattr(time, "time", clock)
    options = {"store_dir": tmp_path, "host_bytes": 1 << 20, "max_model_len": 512}
    options |= {"audit_share": 1.0, "audit_budget": 1e9, "embedder": None, "min_gain_share": 0.1}
    events: dict[str, int] = {}
    for life in range(2):
        faults.chances = {}  # a disk that is broken at the opening is refused there
        with KVShare(str(tiny_folder), **options) as llm:
            faults.chances = chances
            for i in range(_REQUESTS // 2):
                text = prompt(rng) + (f" {i}" if i % 3 else "")
                llm.generate(text, max_tokens=4, ignore_eos=True, repair="none")  # careless
                want = fresh.generate(text, max_tokens=6, ignore_eos=True).token_ids
                for policy in ({"reuse": "exact"}, {"max_divergence": 0.0}):
                    got = llm.generate(text, max_tokens=6, ignore_eos=True, **policy)
                    assert got.token_ids == want, (life, text, policy, got.provenance)
                if i % 5 == 0:
                    llm.flush()
            llm.flush()
            stats = llm.stats()
            for name, count in stats["donors"]["events"].items():
                events[name] = events.get(name, 0) + count
            assert not stats["requests"].get("failed")
            faults.chances = {}
        if chances.get("clock"):
            for path in (tmp_path / "kv").iterdir():
                os.utime(path, (now() + rng.uniform(-1e6, 1e6),) * 2)
    assert faults.calls > 20 or chances.get("full") == 1
    failures = {n for n in events if n.startswith(("read_", "write_"))}
    assert counted <= failures | set(events), events
    assert failures - counted <= {"read_evicted"}, events
    # What could not be deleted is all that is left to repair.
    left = {problem.kind for problem in check.verify(tmp_path).problems}
    assert left <= ({"temporary"} if "unlink" in chances else set()), left
