"""What is in a store folder, without loading a model."""

from __future__ import annotations

import datetime
from pathlib import Path

from rich.console import Console
from rich.tree import Tree

from kvshare_mm.apps.terminal import print_table
from kvshare_mm.errors import KVUnavailableError, StoreError
from kvshare_mm.node import Node
from kvshare_mm.reuse.tree import DeltaTree
from kvshare_mm.store.codec import read_record
from kvshare_mm.store.disk import NODE_SUFFIX
from kvshare_mm.store.media import is_media
from kvshare_mm.store.states import is_state


def show(store_dir: Path, console: Console, tree: bool, limit: int) -> None:
    """Print donors, sizes and, if asked for, the tree. Raises StoreError: no such store."""
    folder = store_dir / "kv"
    if not folder.is_dir():
        raise StoreError(f"{store_dir} is not a store folder: it has no kv/ inside")
    nodes = DeltaTree()
    encoded: list[Node] = []
    num_bytes = unreadable = states = 0
    for path in folder.glob(f"*{NODE_SUFFIX}"):
        try:
            node, _, _ = read_record(path)
        except KVUnavailableError as error:
            unreadable += error.reason != "evicted"
            continue
        num_bytes += path.stat().st_size
        if is_media(node):
            encoded.append(node)
        elif is_state(node):
            states += 1
        else:
            nodes.insert(node)
    newest = sorted(nodes, key=lambda n: -n.created_s)[:limit]
    console.print(
        f"{len(nodes)} donors, {num_bytes / 2**20:.1f} MiB; "
        f"{nodes.num_tokens_owned} tokens held, {nodes.num_tokens_whole} if each were stored whole"
    )
    if unreadable:
        console.print(f"{unreadable} files cannot be read: `kvshare store verify` tells why")
    if encoded:
        positions = sum(len(node) for node in encoded)
        console.print(
            f"encoder outputs kept: {len(encoded)} pictures and clips, {positions} positions"
        )
    if states:
        console.print(f"states of recurrent layers kept: {states}")
    if tree:
        _draw(nodes, newest, console)
        return
    rows = [["donor", "model", "tokens", "owned", "exact", "media", "parent", "created"]]
    rows += [
        [
            node.node_id[:8],
            node.namespace[:8],
            str(len(node)),
            str(node.num_owned),
            str(node.exact_len),
            str(len(node.media) or "-"),
            node.parent[:8] if node.parent else "-",
            _time(node),
        ]
        for node in newest
    ]
    print_table("donors", rows, console)
    if any(node.media for node in newest):
        print_table("pictures and sound", _media(newest), console)


def _media(nodes: list[Node]) -> list[list[str]]:
    """Where pictures and clips stand, their sizes, and the hash that tells equal from other."""
    return [["donor", "positions", "modality", "hash", "size"]] + [
        [
            node.node_id[:8],
            f"{segment.start}-{segment.end - 1} ({segment.end - segment.start})",
            segment.modality.value,
            f"{segment.content_hash:016x}",
            segment.label,
        ]
        for node in nodes
        for segment in node.media
    ]


def _draw(nodes: DeltaTree, shown: list[Node], console: Console) -> None:
    ids = {n.node_id for n in shown}
    root = Tree("donors")
    branches: dict[str, Tree] = {}

    def branch(node: Node) -> Tree:
        if node.node_id not in branches:
            parent = nodes.get(node.parent) if node.parent else None
            under = branch(parent) if parent and parent.node_id in ids else root
            label = f"{node.node_id[:8]}  {len(node)} tokens, owns {node.num_owned}  {_time(node)}"
            branches[node.node_id] = under.add(label)
        return branches[node.node_id]

    for node in sorted(shown, key=lambda n: n.created_s):
        branch(node)
    console.print(root)


def _time(node: Node) -> str:
    return datetime.datetime.fromtimestamp(node.created_s).strftime("%Y-%m-%d %H:%M:%S")
