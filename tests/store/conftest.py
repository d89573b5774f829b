"""Nodes to store, a way to compare what came back, and stores whose disk can be held up."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.store.tiered import TieredStore

MakeStored = Callable[..., StoredNode]

BUDGET = 1 << 24
PATIENCE_S = 60


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_stored() -> MakeStored:
    """Build a node whose content is drawn from its id, so that a mix-up is noticed."""

    def make(
        node_id: str = "a",
        num_tokens: int = 8,
        *,
        own: tuple[tuple[int, int], ...] | None = None,
        pieces: tuple[Piece, ...] = (),
        namespace: str = "ns",
        parent: str | None = None,
        exact_len: int = 0,
        dtype: torch.dtype = torch.float32,
        layers: int = 2,
        heads: int = 1,
        k_dim: int = 4,
        v_dim: int = 4,
        embedding: np.ndarray | None = None,
    ) -> StoredNode:
        rng = np.random.default_rng(list(node_id.encode()))
        spans = tuple(Span(*s) for s in (((0, num_tokens),) if own is None else own))
        node = Node(
            node_id=node_id,
            namespace=namespace,
            align_keys=rng.integers(0, 2**64, num_tokens, dtype=np.uint64),
            own=spans,
            pieces=pieces,
            exact_len=exact_len,
            parent=parent,
            created_s=1.7e9 + 0.123456789,
        )
        k, v = (
            torch.from_numpy(rng.standard_normal((layers, heads, node.num_owned, dim))).to(dtype)
            for dim in (k_dim, v_dim)
        )
        return StoredNode(node, NodeKV(k, v), embedding)

    return make


@pytest.fixture(scope="session")
def assert_same() -> Callable[[StoredNode, StoredNode], None]:
    """Compare two stored nodes bit by bit."""

    def check(got: StoredNode, want: StoredNode) -> None:
        for field in fields(Node):
            a, b = getattr(got.node, field.name), getattr(want.node, field.name)
            if isinstance(b, np.ndarray):
                a, b = (a.dtype, a.tolist()), (b.dtype, b.tolist())
            assert a == b, field.name
        for a, b in ((got.kv.k, want.kv.k), (got.kv.v, want.kv.v)):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            # Bytes, because NaN payloads and signed zeros must survive too.
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        if want.kv.k_exponents is None:
            assert got.kv.k_exponents is None
        else:
            assert got.kv.k_exponents is not None
            assert torch.equal(got.kv.k_exponents, want.kv.k_exponents)
        if want.embedding is None:
            assert got.embedding is None
        else:
            assert got.embedding is not None
            assert got.embedding.dtype == np.float32
            assert np.array_equal(got.embedding, want.embedding)

    return check


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Let the kernel refuse to write files longer than so many bytes, half-way, as a full disk."""

    @contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


class SlowDisk(DiskTier):
    """Writes only while `gate` is set; announces each attempt in `started`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.started = threading.Event()
        self.error: Exception | None = None

    def put(self, stored: StoredNode) -> list[str]:
        self.started.set()
        assert self.gate.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return super().put(stored)


class Gone(list[str]):
    """An `on_gone` that remembers and can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def __call__(self, node_id: str) -> None:
        with self._changed:
            self.append(node_id)
            self._changed.notify_all()

    def wait_for(self, *node_ids: str) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self == list(node_ids), PATIENCE_S)


@pytest.fixture
def gone() -> Gone:
    return Gone()


@pytest.fixture
def open_store(tmp_path: Path, gone: Gone) -> Iterator[Callable[..., TieredStore]]:
    """Open stores on one folder; close them, and their gates, at the end."""
    opened: list[tuple[TieredStore, DiskTier | None]] = []

    def open_one(
        host_bytes: int = BUDGET,
        disk_bytes: int | None = BUDGET,
        queued_bytes: int = BUDGET,
        folder: Path = tmp_path / "kv",
        slow_disk: bool = False,
    ) -> TieredStore:
        disk_type = SlowDisk if slow_disk else DiskTier
        disk = None if disk_bytes is None else disk_type(folder, disk_bytes)
        store = TieredStore(HostTier(host_bytes), disk, gone, max_queued_bytes=queued_bytes)
        opened.append((store, disk))
        return store

    yield open_one
    for store, disk in opened:
        if isinstance(disk, SlowDisk):
            disk.gate.set()
        store.close(PATIENCE_S)


@pytest.fixture
def reopened(
    open_store: Callable[..., TieredStore], make_stored: MakeStored
) -> Callable[..., TieredStore]:
    """A store opened on a disk where another one has left nodes, of which RAM knows nothing."""

    def reopen(*node_ids: str, num_tokens: int = 8) -> TieredStore:
        first = open_store()
        for node_id in node_ids:
            first.put(make_stored(node_id, num_tokens))
        first.close(PATIENCE_S)
        return open_store()

    return reopen
