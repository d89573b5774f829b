"""`kvshare route` as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx2
import pytest

from kvshare_mm.apps.server import logs

from ...helpers import until
from ..conftest import Run
from .conftest import Upstreams


def test_it_says_where_it_is_and_ends_in_order(upstreams: Upstreams) -> None:
    behind = upstreams(2)
    urls = ",".join(f"{u.url}/v1" for u in behind)
    popen = subprocess.Popen(
        [sys.executable, "-m", "kvshare_mm.apps.cli", "route", "--replicas", urls, "--port", "0"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert popen.stderr is not None
    first = popen.stderr.readline()
    found = re.search(r"listening on (http://127\.0\.0\.1:\d+)$", first.strip())
    assert found, first
    said = [popen.stderr.readline() for _ in behind]  # which replicas there are
    assert [u.url in said[i] for i, u in enumerate(behind)] == [True, True]
    answering = 0
    while answering < 2:  # a busy machine may first say that one does not answer
        line = popen.stderr.readline()
        assert line
        answering += "answers" in line
    health = f"{found[1]}/health"
    until(lambda: httpx2.get(health, timeout=30).json().get("answering") == 2)
    asked = httpx2.post(f"{found[1]}/v1/completions", json={"prompt": "hi"}, timeout=30)
    assert asked.status_code == 200
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(60) == 0
    assert "stopped" in popen.stderr.read()


def test_what_cannot_be_meant_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    for words, said in (
        (["--replicas", "http://a/x"], "--replicas: 'http://a/x'"),
        (["--replicas", "http://a", "--allowed-host", "http://b"], "--allowed-host http://b"),
        (["--replicas", "http://a", "--ssl-certfile", "none.pem"], "none.pem"),
    ):
        done = run("route", "--port", 0, *words)
        assert done.exit_code == 1 and said in done.output, done.output


def test_it_waits_for_no_torch() -> None:
    program = "import sys, kvshare_mm.apps.router.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
