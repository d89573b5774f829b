"""``kvshare route``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from kvshare_mm.apps.terminal import plain_errors

_SAFETY = "safety"
_OPERATION = "operation"


def route(
    replicas: Annotated[
        str,
        typer.Option(
            help="URLs of the servers, with commas: http://10.0.0.1:8000,http://10.0.0.2:8000; "
            "dns+http://NAME:8000 stands for all addresses that the name has, asked again every 5 s"
        ),
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8080,
    remembered: Annotated[
        int, typer.Option(min=1, help="earlier requests known, as hashes; 3 to 5 KB each")
    ] = 100_000,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="name by which clients may ask, `*` for any; repeatable; default: localhost and "
            "--host",
            rich_help_panel=_SAFETY,
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="certificate (PEM): serve HTTPS", rich_help_panel=_SAFETY)
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(help="its key (PEM), if in a file of its own", rich_help_panel=_SAFETY),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(min=1, help="open connections, in all", rich_help_panel=_SAFETY)
    ] = 1024,
    max_connections_per_client: Annotated[
        int, typer.Option(min=1, help="of one address", rich_help_panel=_SAFETY)
    ] = 256,
    max_body_mib: Annotated[
        float, typer.Option(min=0.001, help="largest request body", rich_help_panel=_SAFETY)
    ] = 32.0,
    max_held_mib: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="of bodies whose answers have not begun, in all",
            rich_help_panel=_SAFETY,
        ),
    ] = 512.0,
    request_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="seconds for a replica to begin its answer, or to go on with it",
            rich_help_panel=_SAFETY,
        ),
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option(min=1, help="seconds to end requests", rich_help_panel=_OPERATION)
    ] = 30.0,
    json_logs: Annotated[
        bool,
        typer.Option("--json-logs", help="one JSON object a line", rich_help_panel=_OPERATION),
    ] = False,
) -> None:
    """Put several servers behind one address; each request goes to the one that has its donor.

    Start a server or more on each machine, then the router:

        kvshare serve MODEL --port 8001

        kvshare route --replicas http://127.0.0.1:8001,http://127.0.0.1:8002

    All replicas serve the same models, `kvshare serve` with either engine. The router remembers
    hashes of what it has sent to whom; so a request that is like an earlier one reuses that one's
    KV, though each replica has a store of its own. Other requests go where there is least to do.
    Keys and headers are the replicas' to judge: give them the same `--api-keys` file.
    """
    with plain_errors():
        try:
            from kvshare_mm.apps.router import run
        except ImportError as error:
            from kvshare_mm.errors import ConfigError

            raise ConfigError("the router needs `pip install kvshare-mm[server]`") from error
        from kvshare_mm.apps.router.fleet import fleet_of
        from kvshare_mm.apps.server import hosts, logs
        from kvshare_mm.apps.server.options import ServerOptions
        from kvshare_mm.apps.server.run import bind, check_certificate

        logs.configure(json_logs, logging.getLogger().getEffectiveLevel())
        check_certificate(ssl_certfile, ssl_keyfile)
        behind = fleet_of(replicas)
        options = ServerOptions(
            model_name="",
            allowed_hosts=hosts.allowed_hosts(allowed_host or (), host, with_keys=False),
            max_connections=max_connections,
            max_connections_per_client=max_connections_per_client,
            max_body_bytes=int(max_body_mib * 2**20),
            request_timeout_s=request_timeout,
            shutdown_timeout_s=shutdown_timeout,
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
        )
        run.serve(behind, options, bind(host, port), remembered, int(max_held_mib * 2**20))
