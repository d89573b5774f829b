"""vLLM's server in a process of its own, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

# Options of vLLM's own that make it start sooner.
SMALL = ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]


@contextmanager
def server(command: Callable[[int], list[str]], log: Path) -> Iterator[str]:
    """The address of a server that is ready; at the end it must have ended when it was told to.

    Args:
        command: what starts it, by port.
        log: where its output goes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with log.open("w") as out:
        process = subprocess.Popen(
            command(port), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                if httpx2.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in {0, -signal.SIGTERM}, log.read_text()[-4000:]
    finally:
        with suppress(ProcessLookupError):  # vLLM's processes outlive the one that started them
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
