"""What holds for the tests of all apps, and the command that they run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from kvshare_mm.apps.cli import app
from kvshare_mm.native.waiting import WaitingRequests

Run = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes behind an answer waits for its donor, however slowly this machine saves it."""
    monkeypatch.setattr(WaitingRequests, "MAX_HOLD_S", 60.0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the command in this process; the result's output has what was said on stderr too."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    # Commands that serve send all logs to their standard error, which ends with them.
    logs = [logging.getLogger(n) for n in ("", "kvshare_mm.apps.server", "kvshare_mm.assemble")]
    before = [(log, log.level, log.handlers[:]) for log in logs]

    def call(*arguments: str | Path | float, **options: Any) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], **options)

    yield call
    for log, level, handlers in before:
        log.setLevel(level)
        log.handlers[:] = handlers
