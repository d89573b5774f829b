"""The persistent, shareable index: Milvus Lite in a file, or any Milvus server.

The only module that imports pymilvus.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvshare_mm.errors import ConfigError
from kvshare_mm.index import milvus_rows
from kvshare_mm.index.base import Candidate, IndexRecord, IndexUnavailableError
from kvshare_mm.index.lazy_client import LazyClient

logger = logging.getLogger(__name__)

# Calls have timeouts: an idle server need not be asked whether it lives. Milvus Lite hangs up where
# pymilvus asks every ten seconds; gRPC's servers allow it every five minutes.
_NO_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1}

_BATCH = 500

_EF = 1024
"""HNSW search breadth. Milvus Lite looks at this many neighbours *before* the namespace filter: at
64 a namespace of 25 among 5,000 rows had recall 0.45, at 1,024 0.99, for 1 ms more."""

PATIENCE = 60.0
"""Seconds for writes, and for all of Milvus Lite: it runs in this process, where it can be busy
but not unreachable."""

_lite_lock = threading.Lock()
_lite_users: Counter[str] = Counter()


class MilvusIndex:
    """One row per node: its embedding, and nothing else of its prompt.

    Connects at first use, not when made. Safe to use from many threads. Whatever goes wrong with
    Milvus raises `IndexUnavailableError`, with the cause attached.

    Args:
        uri: path of a Milvus Lite database (``*.db``), or a server (``http://host:19530``).
        dim: length of the embeddings.
        embedder_name: what made the embeddings; another embedder gets another collection.
        flush_every: rows after which Milvus Lite is flushed: it searches unflushed rows one by
            one. A server seals segments by itself and is never flushed.
        token: ``user:password`` or API key for a server.
        timeout: seconds for connecting to and searching a server.
        retry_after: seconds during which calls fail at once after a failure.

    Raises:
        ConfigError: `uri` is neither a server nor a ``*.db`` path, or a number is not positive.
    """

    def __init__(
        self,
        uri: str,
        dim: int,
        embedder_name: str,
        flush_every: int = 200,
        *,
        token: str = "",
        timeout: float = 2.0,
        retry_after: float = 10.0,
    ) -> None:
        if min(dim, flush_every) < 1 or timeout <= 0:
            raise ConfigError("dim, flush_every and timeout must be positive")
        self._path = None if "://" in uri or uri.startswith("unix:") else os.path.abspath(uri)
        if self._path is not None and not self._path.endswith(".db"):
            raise ConfigError(f"a Milvus Lite database must be named *.db, got {uri!r}")
        self._uri = uri
        self._dim = dim
        self._flush_every = flush_every
        self._token = token
        self._timeout = timeout
        self._patience = timeout if self._path is None else PATIENCE
        embedder = xxhash.xxh3_64_hexdigest(embedder_name.encode())[:8]
        self.collection = f"kvshare_v{milvus_rows.SCHEMA_VERSION}_{dim}_{embedder}"
        self._milvus = LazyClient(named(uri), self._connect, self._disconnect, retry_after)
        self._lite = self._path is not None
        self._unflushed = 0
        # Milvus Lite does not serialise writers of one collection.
        self._writing = threading.RLock()

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Connect, and wait up to `timeout` seconds until all that is stored is indexed."""
        deadline = time.monotonic() + timeout
        self.flush()
        pending = 1
        while pending:
            with self._milvus.use("describe index") as client:
                index = client.describe_index(self.collection, "dense")
            pending = int(index["pending_index_rows"])
            if pending and time.monotonic() > deadline:
                raise IndexUnavailableError(f"{pending} rows still not indexed after {timeout} s")
            time.sleep(0.05 if pending else 0.0)

    def add(self, records: Sequence[IndexRecord]) -> None:
        """Store records, replacing those known; they are found at once (soon, on a server).

        Raises:
            ValueError: an embedding has another length than `dim`, or a node id is too long.
        """
        rows = [milvus_rows.row(record, self._dim) for record in records]
        with self._writing:
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                with self._milvus.use("upsert") as client:
                    client.upsert(self.collection, batch, timeout=PATIENCE)
                self._unflushed += len(batch)
                if self._unflushed >= self._flush_every:
                    self.flush()

    def remove(self, node_ids: Iterable[str]) -> None:
        """Forget nodes; unknown ids are not an error."""
        gone = [milvus_rows.quoted(node_id) for node_id in node_ids]
        with self._writing:
            for start in range(0, len(gone), _BATCH):
                condition = f"node_id in [{', '.join(gone[start : start + _BATCH])}]"
                with self._milvus.use("delete") as client:
                    client.delete(self.collection, filter=condition, timeout=PATIENCE)

    def search_dense(
        self, namespace: str, embedding: NDArray[np.float32], limit: int
    ) -> list[Candidate]:
        """Nodes of `namespace` by cosine similarity to ``embedding [dim]``, best first.

        Raises:
            ValueError: the embedding has another length than `dim`.
        """
        milvus_rows.check_dim(embedding, self._dim)
        condition = f"{milvus_rows.within(namespace)} and embedded == true"
        params = {"params": {"ef": max(_EF, limit)}}
        if limit < 1:
            return []
        options: dict[str, Any] = {"anns_field": "dense", "filter": condition, "limit": limit}
        options |= {"search_params": params, "timeout": self._patience}
        query = np.asarray(embedding, np.float32)
        with self._milvus.use("search") as client:
            [hits] = client.search(self.collection, [query], **options)
        return [Candidate(hit["node_id"], hit["distance"]) for hit in hits]

    def ids(self) -> set[str]:
        """All nodes of the collection, of every namespace."""
        found: set[str] = set()
        options = {"filter": "", "output_fields": ["node_id"], "timeout": PATIENCE}
        with self._milvus.use("list") as client:
            pages = client.query_iterator(self.collection, batch_size=10_000, **options)
            while page := pages.next():
                found.update(row["node_id"] for row in page)
            pages.close()
        return found

    def reconcile(
        self, records: Sequence[IndexRecord], *, remove_others: bool | None = None
    ) -> tuple[int, int]:
        """Make the index hold exactly `records`, after it was lost, replaced or left behind.

        Only missing records are written: with `ids` a caller can embed just those.

        Args:
            records: everything the store holds.
            remove_others: also remove nodes that are not in `records`. By default only from a
                Lite file: a server may hold the nodes of replicas with stores of their own.

        Returns:
            How many nodes were added, and how many removed.
        """
        if remove_others is None:
            remove_others = self._path is not None
        known = self.ids()
        missing = [record for record in records if record.node_id not in known]
        others = known - {record.node_id for record in records} if remove_others else set()
        self.add(missing)
        self.remove(others)
        if missing or others:
            logger.info("index: %d nodes added, %d removed", len(missing), len(others))
        return len(missing), len(others)

    def flush(self) -> None:
        """Make Milvus Lite index what was added since the last flush; nothing on a server."""
        with self._writing, self._milvus.use("flush") as client:
            if self._lite:
                client.flush(self.collection, timeout=PATIENCE)
            self._unflushed = 0

    def close(self) -> None:
        """Flush and disconnect. Later calls raise `IndexUnavailableError`."""
        with self._writing:
            try:
                if self._unflushed:
                    self.flush()
            except IndexUnavailableError as error:
                # Nothing is lost: Milvus Lite replays its log when it is opened again.
                logger.warning("index: not flushed on close: %s", error)
            self._milvus.close()

    def __len__(self) -> int:
        """Number of nodes. Asks Milvus."""
        return len(self.ids())

    def _connect(self) -> Any:
        if self._path is not None:
            # The file's server runs in this process. It has no AllocTimestamp, which clients do
            # without, but grpc logs each refusal with a traceback.
            logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        client = _open(self._uri, self._path, self._token, self._timeout)
        try:
            # A Milvus Lite server reached over the network needs flushes just as a file does.
            self._lite = "lite" in str(client.get_server_version(timeout=self._timeout))
            if self._path is not None:
                # The file is ours alone. On a server another deployment may use the others.
                for name in client.list_collections(timeout=self._timeout):
                    if name.startswith("kvshare_v") and name != self.collection:
                        logger.warning("index: %s is of another version, dropped", name)
                        client.drop_collection(name, timeout=PATIENCE)
            if not client.has_collection(self.collection, timeout=self._timeout):
                _create_collection(client, self.collection, self._dim)
            client.load_collection(self.collection, timeout=PATIENCE)
        except BaseException:
            self._disconnect(client)
            raise
        return client

    def _disconnect(self, client: Any) -> None:
        client.close()
        if self._path is not None:
            _release_lite(self._path)


def named(uri: str) -> str:
    """What messages call a Milvus; a URI may hold a password."""
    return "Milvus at " + re.sub(r"//[^/]*@", "//", uri)


def connected(uri: str, token: str, timeout: float) -> Any:
    """A client of a Milvus server. May raise anything."""
    return _open(uri, None, token, timeout)


def _open(uri: str, path: str | None, token: str, timeout: float) -> Any:
    # Here, because importing it takes half a second.
    from pymilvus import MilvusClient

    # It brings handlers of its own; what fails is raised, and need not be told with a trace.
    for name in ("pymilvus", "pymilvus.milvus_client"):
        theirs = logging.getLogger(name)
        theirs.handlers.clear()
        theirs.propagate = True
        theirs.setLevel(logging.CRITICAL)
    if path is None:
        # Dedicated: the shared connection of pymilvus outlives its clients.
        return MilvusClient(
            uri, token=token, timeout=timeout, dedicated=True, grpc_options=_NO_PINGS
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("pymilvus.client.iterator").setLevel(logging.ERROR)  # no AllocTimestamp
    with _lite_lock:
        client = MilvusClient(path, timeout=PATIENCE, dedicated=True, grpc_options=_NO_PINGS)
        _lite_users[path] += 1
    return client


def _release_lite(path: str) -> None:
    from milvus_lite.server_manager import server_manager_instance

    with _lite_lock:
        _lite_users[path] -= 1
        # Its server in this process would hold the file's lock until the process ends.
        if not _lite_users[path]:
            server_manager_instance.release_server(path)


def _create_collection(client: Any, name: str, dim: int) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    length = milvus_rows.ID_LENGTH
    schema.add_field("node_id", DataType.VARCHAR, is_primary=True, max_length=length)
    schema.add_field("namespace", DataType.VARCHAR, max_length=milvus_rows.NAMESPACE_LENGTH)
    schema.add_field("embedded", DataType.BOOL)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dim)
    indexes = client.prepare_index_params()
    hnsw = {"M": 16, "efConstruction": 100}
    indexes.add_index("dense", index_type="HNSW", metric_type="IP", params=hnsw)
    client.create_collection(name, schema=schema, index_params=indexes, timeout=PATIENCE)
