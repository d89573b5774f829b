"""The desk without an API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from kvshare_mm.apps.desk.endpoint import Endpoint
from kvshare_mm.apps.server import run as server
from kvshare_mm.apps.server.hosts import allowed_hosts
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.llm import KVShare


def local(model: str, store_dir: Path | None, media_embedder: str | None) -> KVShare:
    """An engine of this process."""
    return KVShare(
        model,
        store_dir=store_dir,
        embedder=None,
        media_embedder=media_embedder,
        local_media=False,
    )


def elsewhere(url: str, model: str | None, key: str | None) -> KVShare:
    """An engine behind a URL: what the desk and its server ask of one, it has."""
    return cast(KVShare, Endpoint(url, model, key))


def run(load: Callable[[], KVShare], name: str, host: str, port: int) -> None:
    """Serve the desk until it is interrupted.

    Args:
        load: makes the engine.
        name: of the model.
    """
    listening = server.bind(host, port)
    options = ServerOptions(name, allowed_hosts=allowed_hosts((), host, with_keys=False))
    server.serve(load, options, listening, ui=True, api=False)
