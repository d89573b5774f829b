"""The catalogue that replicas share, in a Milvus server: who has a donor like this prompt.

A row holds nothing of a prompt that could be read: its n-grams and media are hashed with a key of
its namespace, which comes from a secret that Milvus does not have. So rows of different namespaces
have nothing in common either, not even for the same text.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvshare_mm.index import milvus, milvus_rows
from kvshare_mm.index.lazy_client import LazyClient
from kvshare_mm.index.ngrams import smallest_ngrams
from kvshare_mm.node import Node
from kvshare_mm.stream import Modality, Segment

_VERSION = 1
# 64 find the pairs as well, but lose donors that differ from their neighbours in a few fields of
# one template (recall at 4: 0.64 with 64, 0.97 with 256).
_NGRAMS = 256
_MEDIUM = 32**0.5  # a picture or clip that both have counts as 32 n-grams
_OTHER_CLOCKS_S = 86_400  # nobody's clock is that far behind
_ID = re.compile(r"[0-9a-f]{32}")


class Fingerprints:
    """Prompts of one namespace as sparse vectors that tell who has the key nothing but likeness.

    Args:
        secret: of the replicas.
        namespace: whose prompts.
    """

    def __init__(self, secret: bytes, namespace: str) -> None:
        self._key = hmac.digest(secret, namespace.encode(), "sha256")

    @property
    def namespace(self) -> str:
        """What the namespace is called in rows."""
        return hmac.digest(self._key, b"namespace", "sha256").hex()

    def of(self, keys: np.ndarray, media: Sequence[Segment]) -> dict[int, float]:
        """The sparse vector of a prompt: its inner product with another's counts what both have.

        Args:
            keys: ``[N]`` uint64 alignment keys.
            media: its segments; what is text is left out.
        """
        ngrams, _ = smallest_ngrams(keys, _NGRAMS)
        found = {self._dimension(ngram.tobytes()): 1.0 for ngram in ngrams}
        for segment in media:
            if segment.modality is not Modality.TEXT:
                name = f"{segment.modality}:{segment.content_hash}"
                found[self._dimension(name.encode())] = _MEDIUM
        return found

    def _dimension(self, content: bytes) -> int:
        digest = hashlib.blake2b(content, digest_size=4, key=self._key).digest()
        return int.from_bytes(digest, "little") % ((1 << 32) - 2)


class SharedCatalogue:
    """A row for each node that a replica published. Thread-safe; every method may raise
    IndexUnavailableError, and for `retry_after` seconds after that at once.

    Args:
        uri: the server, ``http://host:19530``.
        replica: this process's name.
        ttl_s: seconds after which a row is no longer found.
        token: ``user:password`` or API key.
        timeout: seconds for a search.
    """

    def __init__(
        self,
        uri: str,
        replica: str,
        ttl_s: float,
        token: str = "",
        timeout: float = 2.0,
        retry_after: float = 10.0,
    ) -> None:
        self.collection = f"kvshare_shared_v{_VERSION}"
        self._uri, self._token, self._timeout = uri, token, timeout
        self._replica = replica
        self._ttl_s = ttl_s
        self._milvus = LazyClient(
            milvus.named(uri), self._connect, lambda client: client.close(), retry_after
        )

    def row(self, node: Node, fingerprints: Fingerprints) -> dict[str, Any] | None:
        """What others find a node by; None: it is too short to be found."""
        sparse = fingerprints.of(node.wide_keys, node.media)
        if not sparse:
            return None
        return {
            "node_id": node.node_id,
            "namespace": fingerprints.namespace,
            "replica": self._replica,
            "modality": "+".join(sorted({m.modality.value for m in node.media} | {"text"})),
            "tokens": len(node),
            "tier": "shared",
            "expires": int(time.time() + self._ttl_s),
            "sparse": sparse,
        }

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Publish rows, replacing those of the same nodes."""
        with self._milvus.use("upsert") as client:
            client.upsert(self.collection, list(rows), timeout=milvus.PATIENCE)
        # Milvus Lite indexes what is new in the next search, which shall not be a request's.
        self._search(rows[0]["namespace"], rows[0]["sparse"], 1, milvus.PATIENCE)

    def search(
        self, fingerprints: Fingerprints, sparse: dict[int, float], limit: int, own: bool = False
    ) -> list[str]:
        """Ids of the nodes that have most in common with ``sparse``, best first: of other replicas,
        or else this one's `own`."""
        if not sparse:
            return []
        return self._search(fingerprints.namespace, sparse, limit, self._timeout, own)

    def remove(self, node_ids: Iterable[str]) -> None:
        """Forget nodes; unknown ids are not an error."""
        gone = ", ".join(map(milvus_rows.quoted, node_ids))
        self._delete(f"node_id in [{gone}]")

    def remove_expired(self) -> None:
        """Forget what nobody finds any more: this replica's rows, and those that others, whose
        clocks may be behind, let expire long ago."""
        now = int(time.time())
        mine = f'(replica == "{self._replica}" and expires < {now})'
        self._delete(f"{mine} or expires < {now - _OTHER_CLOCKS_S}")

    def close(self) -> None:
        self._milvus.close()

    def _delete(self, condition: str) -> None:
        with self._milvus.use("delete") as client:
            client.delete(self.collection, filter=condition, timeout=milvus.PATIENCE)

    def _search(
        self,
        namespace: str,
        sparse: dict[int, float],
        limit: int,
        timeout: float,
        own: bool = False,
    ) -> list[str]:
        condition = (
            f'namespace == "{namespace}" and replica {"==" if own else "!="} "{self._replica}"'
            f" and expires > {int(time.time())}"
        )
        options: dict[str, Any] = {"anns_field": "sparse", "filter": condition, "limit": limit}
        with self._milvus.use("search") as client:
            [hits] = client.search(self.collection, [sparse], timeout=timeout, **options)
        # Ids become keys of the shared store: what is not one of ours is nobody's.
        return [hit["node_id"] for hit in hits if _ID.fullmatch(hit["node_id"])]

    def _connect(self) -> Any:
        client = milvus.connected(self._uri, self._token, self._timeout)
        try:
            if not client.has_collection(self.collection, timeout=self._timeout):
                self._create(client)
            client.load_collection(self.collection, timeout=milvus.PATIENCE)
        except BaseException:
            client.close()
            raise
        return client

    def _create(self, client: Any) -> None:
        from pymilvus import DataType

        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("node_id", DataType.VARCHAR, is_primary=True, max_length=64)
        for name in ("namespace", "replica", "modality", "tier"):
            schema.add_field(name, DataType.VARCHAR, max_length=64)
        for name in ("tokens", "expires"):
            schema.add_field(name, DataType.INT64)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        indexes = client.prepare_index_params()
        indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        client.create_collection(
            self.collection, schema=schema, index_params=indexes, timeout=milvus.PATIENCE
        )
