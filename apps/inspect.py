"""What is in a store folder, without loading a model."""

from __future__ import annotations

import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from kvshare_mm.delta_tree import DeltaTree, Node
from kvshare_mm.errors import StoreError
from kvshare_mm.store.disk import DiskTier


def show(store_dir: Path, console: Console, tree: bool, limit: int) -> None:
    """Print donors, sizes and, if asked for, the tree. Raises StoreError: no such store."""
    folder = store_dir / "kv"
    if not folder.is_dir():
        raise StoreError(f"{store_dir} is not a store folder: it has no kv/ inside")
    disk = DiskTier(folder, max_bytes=1 << 62)
    nodes = DeltaTree()
    for node, _ in disk.records():
        nodes.insert(node)
    newest = sorted(nodes, key=lambda n: -n.created_s)[:limit]
    console.print(
        f"{len(nodes)} donors, {disk.num_bytes / 2**20:.1f} MiB; "
        f"{nodes.num_tokens_owned} tokens held, {nodes.num_tokens_whole} if each were stored whole"
    )
    if tree:
        _draw(nodes, newest, console)
        return
    table = Table()
    for heading in ("donor", "model", "tokens", "owned", "exact", "parent", "created"):
        table.add_column(
            heading, justify="right" if heading in ("tokens", "owned", "exact") else "left"
        )
    for node in newest:
        table.add_row(
            node.node_id[:8],
            node.namespace[:8],
            str(len(node)),
            str(node.num_owned),
            str(node.exact_len),
            node.parent[:8] if node.parent else "-",
            _time(node),
        )
    console.print(table)


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
