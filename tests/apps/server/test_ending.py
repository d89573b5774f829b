"""SIGTERM ends the process in time, whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest

from ...helpers import until

pytestmark = pytest.mark.e2e

_PROGRAM = """
import logging, sys, threading, time
from kvshare_mm.apps.server import run
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.llm import KVShare

logging.basicConfig(level=logging.INFO)
run.MARGIN_S = {margin}
listening = run.bind("127.0.0.1", 0)
model, store = sys.argv[1:]

def hang(*_, **__):
    open(store + "/hangs", "w").close()
    time.sleep(1000)

def load():
    llm = KVShare(model, embedder=None, store_dir=store, media_workers=2)
    {inside}
    return llm

{before}
run.serve(load, ServerOptions("tiny", shutdown_timeout_s=2), listening)
"""
_LIMIT_S = 2 + 60  # beside the margin; the last are for a busy machine


class Server:
    """A process with a small model in it; `margin`: seconds for tidying up."""

    def __init__(
        self,
        model: Path,
        store: Path,
        inside: str = "pass",
        before: str = "",
        margin: int = 4,
    ) -> None:
        self._limit_s = _LIMIT_S + margin
        program = textwrap.dedent(_PROGRAM).format(inside=inside, before=before, margin=margin)
        self.popen = subprocess.Popen(
            [sys.executable, "-c", program, str(model), str(store)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_STATE_HOME": str(store)},
        )
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if "listening on" in line:
                self.url = line.split("listening on ")[1].strip()
                break

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 120
        while self.health() != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def health(self) -> int:
        try:
            return httpx2.get(f"{self.url}/health", timeout=60).status_code
        except httpx2.ConnectError:  # its socket is bound, and does not listen yet
            return 0

    def chat(self, timeout_s: float = 60) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body, timeout=timeout_s)

    def end(self) -> tuple[int, str]:
        """Status and what was said after SIGTERM. Fails if the process outlives its time."""
        self.popen.send_signal(signal.SIGTERM)
        try:
            _, said = self.popen.communicate(timeout=self._limit_s)
        finally:
            self.popen.kill()
            self.popen.wait()
        return self.popen.returncode, said


def test_with_nothing_to_do(tiny_folder: Path, tmp_path: Path) -> None:
    server = Server(tiny_folder, tmp_path, margin=60)  # nothing hangs: it takes what it needs
    server.wait_ready()
    assert server.chat().status_code == 200
    code, said = server.end()
    assert code == 0 and "stopped" in said
    assert list(tmp_path.rglob("*.kvnode"))


def test_while_the_model_loads(tiny_folder: Path, tmp_path: Path) -> None:
    server = Server(tiny_folder, tmp_path, inside="time.sleep(1000)")
    while server.health() != 503:
        assert server.popen.poll() is None
    _, said = server.end()
    assert "still loading" in said


def test_while_a_thread_hangs(tiny_folder: Path, tmp_path: Path) -> None:
    """Python waits for such a thread; finished donors are kept before."""
    hang = "threading.Thread(target=time.sleep, args=(1000,)).start()"
    # Beside what hangs it takes what it needs.
    server = Server(tiny_folder, tmp_path, before=hang, margin=15)
    server.wait_ready()
    assert server.chat().status_code == 200
    code, said = server.end()
    assert code == 1 and "Timeout" in said
    assert list(tmp_path.rglob("*.kvnode"))


@pytest.mark.parametrize(
    "hang",
    [
        "llm._parts.runner.decode = hang",
        "type(llm.tokenizer).apply_chat_template = hang",
    ],
    ids=["computed", "prepared"],
)
def test_while_a_request_hangs(tiny_folder: Path, tmp_path: Path, hang: str) -> None:
    server = Server(tiny_folder, tmp_path, inside=hang)
    server.wait_ready()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(server.chat)
        until((tmp_path / "hangs").exists, 60)
        code, said = server.end()
    assert code == 1 and "Timeout" in said


def test_processes_that_decode_end_too(media_folder: Callable[[str], Path], tmp_path: Path) -> None:
    server = Server(media_folder("qwen2_5_vl"), tmp_path, margin=60)  # it takes what it needs
    server.wait_ready()
    children = psutil.Process(server.popen.pid).children()
    decoding = [child for child in children if any("decode" in word for word in child.cmdline())]
    assert len(decoding) == 2
    decoding[0].suspend()
    code, _ = server.end()
    assert code == 0
    assert not any(child.is_running() for child in decoding)
