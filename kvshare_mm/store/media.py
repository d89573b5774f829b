"""Encoder outputs in the store: each is a node of its own, under the media's own namespace."""

from __future__ import annotations

import time

import numpy as np
import torch

from kvshare_mm.identity import text_identity
from kvshare_mm.node import Node, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.tiered import TieredStore
from kvshare_mm.stream import MediaItem, Segment

_PREFIX = "media:"


def media_namespace(ns: str) -> str:
    """Where the encoder outputs of a namespace's requests are. It shares them with no other."""
    return _PREFIX + ns


def is_media(node: Node) -> bool:
    """Whether a stored node is an encoder's output and not a request."""
    return node.namespace.startswith(_PREFIX)


def media_id(ns: str, item: MediaItem) -> str:
    """The id of an item's node."""
    return f"{_ids_begin(ns)}{item.digest}"


def media_ids(store: TieredStore, ns: str | None = None) -> list[str]:
    """Ids of all encoder outputs in a store, or of those of a namespace."""
    begin = _PREFIX if ns is None else _ids_begin(ns)
    return [node_id for node_id in store.ids() if node_id.startswith(begin)]


def _ids_begin(ns: str) -> str:
    return f"{_PREFIX}{text_identity(ns)}-"


def as_node(ns: str, item: MediaItem, features: torch.Tensor) -> StoredNode:
    """A node that owns an item's features, ``[length, hidden_size]``, as its K; its V is empty."""
    length = len(features)
    node = Node(
        node_id=media_id(ns, item),
        namespace=media_namespace(ns),
        align_keys=np.arange(length, dtype=np.uint64),
        own=(Span(0, length),),
        created_s=time.time(),
        media=(Segment(item.modality, 0, length, item.content_hash, item.label),),
    )
    k = features.detach().cpu().contiguous()[None, None]
    return StoredNode(node, NodeKV(k, k.new_empty(1, 1, length, 0)))


def features_of(stored: StoredNode) -> torch.Tensor:
    """``[length, hidden_size]``."""
    return stored.kv.k[0, 0]
