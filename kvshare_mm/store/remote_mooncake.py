"""Mooncake's store as a store that replicas share. The only module that imports mooncake.

One object a part, the parts of a key in one group: what asks for one of them keeps all from being
evicted, and they are evicted together. Mooncake has no expiry: what was used longest ago goes when
room is needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from kvshare_mm.errors import ConfigError, KVUnavailableError
from kvshare_mm.store.breaker import Breaker
from kvshare_mm.store.shared import RECORD

T = TypeVar("T")

_USUAL = {
    "metadata_server": "P2PHANDSHAKE",
    "local_hostname": "127.0.0.1",
    "protocol": "tcp",
    "rdma_devices": "",
    "local_buffer_size": str(128 << 20),
}
# Without these a call takes up to 90 s where something hangs or was never there, and connecting
# writes a page of lines. There is no other way to say it.
_ENVIRONMENT = {
    "MC_RPC_TIMEOUT_MS": "1000",
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "1",
    "MC_TCP_STATUS_TIMEOUT_SEC": "1",
    "MC_LOG_LEVEL": "ERROR",
}
_THREADS, _AT_ONCE = 4, 64
_NO_ROOM, _NOT_FOUND = -200, -704


class MooncakeStore:
    """A `RemoteStore` in Mooncake, of which this process holds nothing. Connects at first use.

    Thread-safe. Mooncake's client takes seconds to notice what is down, whatever it is told: it is
    called by threads for which nobody waits longer than `timeout_s`.

    Args:
        url: ``mooncake://master:port``, with options of Mooncake's client behind a question mark:
            metadata_server (P2PHANDSHAKE), local_hostname (127.0.0.1), protocol (tcp),
            rdma_devices, local_buffer_size (bytes; 128 MiB).
        timeout_s: longest wait for an answer.
        retry_after_s: seconds for which it is left alone after three failures in a row.

    Raises:
        ConfigError: Mooncake or a library that it needs is not installed, or the URL is none.
    """

    def __init__(self, url: str, timeout_s: float = 1.0, retry_after_s: float = 10.0) -> None:
        self._options = _options_of(url)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mooncake import store
        except ImportError as error:
            raise ConfigError(
                "shared_store needs Mooncake: pip install kvshare-mm[mooncake], and the library "
                f"libibverbs (on Debian and Ubuntu: apt install libibverbs1): {error}"
            ) from error
        self._mooncake = store
        self._client: Any = None
        self._connecting = threading.Lock()
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, "kvshare-mooncake")
        self.breaker = Breaker(retry_after_s, OSError)

    def put(self, key: str, part: str, content: bytes | memoryview, ttl_s: float) -> None:
        config = self._mooncake.ReplicateConfig()
        config.group_ids = [key]
        self._ask(
            lambda client: _done(client.upsert(f"{key}/{part}", content, config)),
            late=lambda put: self._remove_late(key, put),
        )

    def get(self, key: str, part: str) -> bytes | None:
        return self._ask(lambda client: _read(client, f"{key}/{part}"))

    def delete(self, key: str) -> None:
        self._ask(lambda client: _remove(client, key))

    def lease(self, key: str, ttl_s: float) -> bool:
        return self._ask(lambda client: _is_there(client, f"{key}/{RECORD}"))

    def agree(self, key: str, mine: bytes) -> bytes:
        config = self._mooncake.ReplicateConfig()
        config.with_hard_pin = True  # never evicted

        def agreed(client: Any) -> bytes | None:
            _done(client.put(key, mine, config))  # what is there stays
            return _read(client, key)

        if (found := self._ask(agreed)) is None:
            raise KVUnavailableError("shared_full", f"{key} could not be kept")
        return found

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def _remove_late(self, key: str, put: Future[None]) -> None:
        """A part was put after its node was given up, and maybe deleted: it would stay. If the node
        was published again meanwhile, the part would not fit the others."""
        if not put.cancelled() and put.exception() is None:
            with suppress(RuntimeError):  # closed
                self._threads.submit(lambda: _remove(self._connected(), key))

    def _ask(self, call: Callable[[Any], T], late: Callable[[Future[T]], None] | None = None) -> T:
        """Args:
        late: called with a call that nobody waits for any more, once it has ended.
        """
        with self.breaker.use():
            answer = self._threads.submit(lambda: call(self._connected()))
            try:
                return answer.result(self._timeout_s)
            except TimeoutError as error:  # an OSError, too
                answer.cancel()
                if late is not None:
                    answer.add_done_callback(late)
                raise TimeoutError(f"no answer for {self._timeout_s} s") from error

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                client = self._mooncake.MooncakeDistributedStore()
                _done(client.setup(self._options))
                self._client = client
            return self._client


def _options_of(url: str) -> dict[str, str]:
    """What Mooncake's client is set up with."""
    try:
        parts = urlsplit(url)
        if parts.scheme != "mooncake" or not parts.hostname or not parts.port or parts.path:
            raise ValueError("not mooncake://master:port")
        given = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        if unknown := sorted(given.keys() - _USUAL.keys()):
            raise ValueError(f"{unknown[0]} is none of {', '.join(_USUAL)}")
    except ValueError as error:
        raise ConfigError(f"shared_store={url!r}: {error}") from error
    return {**_USUAL, **given, "master_server_addr": parts.netloc, "global_segment_size": "0"}


def _done(code: int) -> None:
    if code == _NO_ROOM:
        raise KVUnavailableError("shared_full", "the shared store is full")
    if code < 0:
        raise OSError(f"Mooncake's error {code}")


def _is_there(client: Any, name: str) -> bool:
    found: int = client.is_exist(name)
    _done(found)
    return found == 1


def _read(client: Any, name: str) -> bytes | None:
    content: bytes = client.get(name)
    if not content and _is_there(client, name):
        raise OSError(f"{name} is there and cannot be read")
    return content or None


def _remove(client: Any, key: str) -> None:
    """Remove the parts of a key, the record first, whoever reads them."""
    parts = [RECORD]
    for start in count(0, _AT_ONCE):
        parts += [str(block) for block in range(start, start + _AT_ONCE)]
        codes = client.batch_remove([f"{key}/{part}" for part in parts], True)
        for code in codes:
            _done(0 if code == _NOT_FOUND else code)
        if codes[-1] == _NOT_FOUND:
            return
        parts = []
