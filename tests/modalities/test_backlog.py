"""Waiting for what a thread was given, and not for what it is given meanwhile."""

from __future__ import annotations

import threading

from kvshare_mm.modalities.backlog import Backlog

from ..helpers import until


def test_nobody_waits_for_what_is_given_meanwhile() -> None:
    backlog = Backlog(1)
    waited: list[bool] = []
    waiting = threading.Thread(target=lambda: waited.append(backlog.wait(60)))
    waiting.start()
    until(lambda: bool(backlog._changed._waiters))  # type: ignore[attr-defined]
    backlog.give()
    backlog.did()
    waiting.join(60)
    assert waited == [True]
    assert not backlog.wait(0)
    backlog.did()
    assert backlog.wait(0)
