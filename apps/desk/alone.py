"""The desk without an API."""

from __future__ import annotations

from pathlib import Path

from kvshare_mm.apps.server import run as server
from kvshare_mm.apps.server.hosts import allowed_hosts
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.llm import KVShare


def run(model: str, host: str, port: int, store_dir: Path | None) -> None:
    """Serve the desk until it is interrupted."""
    listening = server.bind(host, port)

    def load() -> KVShare:
        return KVShare(model, store_dir=store_dir, embedder=None, local_media=False)

    options = ServerOptions(model, allowed_hosts=allowed_hosts((), host, with_keys=False))
    server.serve(load, options, listening, ui=True, api=False)
