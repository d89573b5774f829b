"""What a record looks like in Milvus: rows and literals. Knows no client."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.identity import DIGEST_SIZE, text_identity
from kvshare_mm.index.base import IndexRecord

SCHEMA_VERSION = 4
"""Part of the collection's name: raise it whenever fields, indexes or what is in them change."""

ID_LENGTH = 256
"""Longest node id in bytes."""

NAMESPACE_LENGTH = 2 * DIGEST_SIZE
"""Bytes of a row's namespace."""


def row(record: IndexRecord, dim: int) -> dict[str, Any]:
    """A record as Milvus holds it.

    Raises:
        ValueError: the embedding has another length than `dim`, or the node id is too long.
    """
    if record.embedding is not None:
        check_dim(record.embedding, dim)
    if not 0 < len(record.node_id.encode()) <= ID_LENGTH:
        raise ValueError(f"a node id has 1 to {ID_LENGTH} bytes, got {record.node_id!r}")
    dense = np.zeros(dim) if record.embedding is None else record.embedding
    return {
        "node_id": record.node_id,
        "namespace": text_identity(record.namespace),
        "embedded": record.embedding is not None,
        "dense": np.asarray(dense, np.float32),
    }


def check_dim(embedding: NDArray[np.float32], dim: int) -> None:
    """Raises ValueError unless `embedding` is ``[dim]``."""
    if embedding.shape != (dim,):
        raise ValueError(f"embedding has shape {embedding.shape}, expected ({dim},)")


def within(namespace: str) -> str:
    """The filter that lets only rows of `namespace` pass."""
    # Rows hold a hash of it: bounded, and safe in a filter (Milvus Lite has no filter parameters).
    return f'namespace == "{text_identity(namespace)}"'


def quoted(text: str) -> str:
    """`text` as a string literal of the filter language."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
