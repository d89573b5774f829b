"""What an operator decides about a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvshare_mm.modalities.fetch import FetchPolicy

Scope = Literal["tenant", "salt", "global"]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of the server; those of the engine are `kvshare_mm.config.KVShareConfig`.

    Attributes:
        model_name: what clients call the model.
        scope: who may share KV: "tenant" requests of one tenant; "salt" only requests that name
            the same ``cache_salt``; "global" all requests, those with a ``cache_salt`` apart.
        keys_file: who may ask, see `keys.KeyRing`; None: everybody.
        api_key: the one key of a server without `keys_file`, or None.
        admin_key: a further key that may administrate the cache, or None.
        private_pages: whether ``/metrics``, ``/docs`` and ``/openapi.json`` need an admin key.
        allowed_hosts: names and addresses by which the server may be asked, see `hosts.HostCheck`;
            the command line narrows them, see `hosts.allowed_hosts`.
        cors_origins: origins of pages whose scripts may ask; ``*``: of all.
        expose_prompts: whether administrators see the text of donors.
        max_connections: most open connections.
        max_connections_per_client: most of one client: of one address, or one /64 of IPv6.
        max_body_bytes: largest request body.
        header_timeout_s: seconds for the headers to arrive.
        body_timeout_s: seconds for the body to arrive.
        idle_timeout_s: seconds that a connection is kept for another request.
        write_timeout_s: seconds for a client to take next to nothing of its answer.
        request_timeout_s: seconds for a whole request.
        shutdown_timeout_s: seconds that requests in flight get to end.
        stall_after_s: seconds without any progress after which waiting requests are stuck.
        max_waiting: requests of text that may wait to be tokenised; more get status 429.
        media_threads: requests with media that are prepared at a time.
        max_media_waiting: those that may wait to be prepared; more get status 429.
        max_choices: most answers of one request.
        max_media: most pictures, clips and videos of one request.
        ssl_certfile: certificate chain (PEM) for HTTPS, or None.
        ssl_keyfile: its key (PEM); None: it is in `ssl_certfile`.
        fetch: what media may be fetched from where.
    """

    model_name: str
    scope: Scope = "global"
    keys_file: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    private_pages: bool = False
    allowed_hosts: tuple[str, ...] = ("*",)
    cors_origins: tuple[str, ...] = ()
    expose_prompts: bool = False
    max_connections: int = 1024
    max_connections_per_client: int = 256
    max_body_bytes: int = 32 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    shutdown_timeout_s: float = 30.0
    stall_after_s: float = 120.0
    max_waiting: int = 512
    media_threads: int = 2
    max_media_waiting: int = 32
    max_choices: int = 16
    max_media: int = 8
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
