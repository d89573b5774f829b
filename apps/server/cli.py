"""``kvshare serve`` and ``kvshare keys``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvshare_mm.apps.openmp import wait_asleep
from kvshare_mm.apps.options import Values, config_options, described
from kvshare_mm.apps.server.options import Scope
from kvshare_mm.apps.terminal import plain_errors
from kvshare_mm.models.names import refuse_unknown

console = Console()
keys = typer.Typer(help="API keys: each bound to a tenant, kept as hashes in a file.")

_ENGINE = "engine"
_SAFETY = "tenancy and safety"
_OPERATION = "operation"
_LIMITS = "limits of the key; default: none"


def _renamed(value: str | None) -> None:
    if value is not None:
        raise typer.BadParameter("it is called --scope now")


# What strangers send is decoded by processes of its own, and smaller than a caller's own files.
@config_options(
    {
        _ENGINE: (
            *("engine", "store_dir", "max_model_len", "max_num_seqs", "max_queue"),
            *("repair", "max_divergence", "reuse", "host_bytes", "disk_bytes", "donor_dtype"),
            *("audit_share", "audit_budget", "calibration"),
            *("shared_store", "shared_ttl_s", "shared_deadline_ms"),
            *("index_uri", "embedder", "media_embedder", "dtype", "device"),
        ),
        _SAFETY: ("max_media_bytes", "media_workers", "media_deadline_s"),
    },
    max_media_bytes=20 << 20,
    media_workers=2,
)
def serve(
    context: typer.Context,
    config: Values,
    model: Annotated[str, typer.Argument(help=described("model"))] = "smollm2",
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM_OPTIONS]...", help="vLLM's own, with --engine vllm"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="what clients call the model; default: MODEL")
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="also show the customer-service desk")] = False,
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="who may share KV; default: tenant with --api-keys, else global",
            rich_help_panel=_SAFETY,
        ),
    ] = None,
    sharing: Annotated[
        str | None, typer.Option(hidden=True, callback=_renamed, help="now --scope")
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="file of keys, see `kvshare keys add`", rich_help_panel=_SAFETY),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="KVSHARE_SERVER_API_KEY",
            help="the one key of all clients; better in the variable, which `ps` does not show",
            rich_help_panel=_SAFETY,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="name by which clients may ask, `*` for any; repeatable; default: localhost and "
            "--host, with keys any",
            rich_help_panel=_SAFETY,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="origin whose pages may ask, like https://shop.example, or `*`; repeatable",
            rich_help_panel=_SAFETY,
        ),
    ] = None,
    private_pages: Annotated[
        bool,
        typer.Option(
            "--private-pages",
            help="/metrics, /docs and /openapi.json need an admin key",
            rich_help_panel=_SAFETY,
        ),
    ] = False,
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
    expose_prompts: Annotated[
        bool,
        typer.Option(
            "--expose-prompts", help="show donors' text to administrators", rich_help_panel=_SAFETY
        ),
    ] = False,
    allow_domain: Annotated[
        list[str] | None,
        typer.Option(help="fetch media only from here; repeatable", rich_help_panel=_SAFETY),
    ] = None,
    allow_http: Annotated[
        bool,
        typer.Option("--allow-http", help="fetch media without TLS too", rich_help_panel=_SAFETY),
    ] = False,
    media_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="folder whose files file:// may name; repeatable", rich_help_panel=_SAFETY
        ),
    ] = None,
    max_body_mib: Annotated[
        float, typer.Option(min=0.001, help="largest request body", rich_help_panel=_SAFETY)
    ] = 32.0,
    media_timeout: Annotated[
        float, typer.Option(min=0.1, help="seconds to fetch a medium", rich_help_panel=_SAFETY)
    ] = 10.0,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="seconds for a request", rich_help_panel=_SAFETY)
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option(min=1, help="seconds to end requests", rich_help_panel=_OPERATION)
    ] = 30.0,
    stall_after: Annotated[
        float,
        typer.Option(
            min=1,
            help="seconds without progress after which /health says 503",
            rich_help_panel=_OPERATION,
        ),
    ] = 120.0,
    json_logs: Annotated[
        bool,
        typer.Option("--json-logs", help="one JSON object a line", rich_help_panel=_OPERATION),
    ] = False,
    otlp_traces: Annotated[
        str | None,
        typer.Option(help="OpenTelemetry endpoint (OTLP over HTTP)", rich_help_panel=_OPERATION),
    ] = None,
) -> None:
    """Serve a model with OpenAI's API; requests that are alike share KV cache."""
    with plain_errors():
        if config["engine"] == "vllm":
            from kvshare_mm.apps.server import vllm_server

            vllm_server.replace_process(_named(context), vllm_options or [])
        if vllm_options:
            raise typer.BadParameter("only --engine vllm takes options after MODEL")
        _check_installed()
        refuse_unknown(model)
        wait_asleep()
        from kvshare_mm.apps.server import admin_key, hosts, logs, run
        from kvshare_mm.apps.server.options import ServerOptions
        from kvshare_mm.config import KVShareConfig
        from kvshare_mm.errors import ConfigError
        from kvshare_mm.modalities.fetch import FetchPolicy

        level = logging.getLogger().getEffectiveLevel()
        logs.configure(json_logs, level)
        engine = KVShareConfig.of(model=model, local_media=False, **config)
        if api_keys and api_key is not None:
            raise ConfigError("either --api-keys FILE or --api-key KEY (KVSHARE_SERVER_API_KEY)")
        with_keys = api_keys is not None or api_key is not None
        allowed_hosts = hosts.allowed_hosts(allowed_host or (), host, with_keys)
        cors_origins = hosts.cors_origins(cors_origin or ())
        run.check_certificate(ssl_certfile, ssl_keyfile)
        listening = run.bind(host, port)
        port = listening.getsockname()[1]
        key = None if api_keys else admin_key.write(port)
        schemes = {"https", "data"} | ({"http"} if allow_http else set())
        options = ServerOptions(
            model_name=served_model_name or model,
            scope=scope or ("tenant" if with_keys else "global"),
            keys_file=api_keys,
            api_key=api_key,
            admin_key=key,
            private_pages=private_pages,
            allowed_hosts=allowed_hosts,
            cors_origins=cors_origins,
            max_connections=max_connections,
            max_connections_per_client=max_connections_per_client,
            expose_prompts=expose_prompts,
            max_body_bytes=int(max_body_mib * 2**20),
            request_timeout_s=request_timeout,
            shutdown_timeout_s=shutdown_timeout,
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
            stall_after_s=stall_after,
            media_threads=max(1, engine.media_workers),
            fetch=FetchPolicy(
                schemes=frozenset(schemes | ({"file"} if media_root else set())),
                domains=frozenset(allow_domain) if allow_domain else None,
                file_roots=tuple(media_root or ()),
                max_bytes=engine.max_media_bytes,
                timeout_s=media_timeout,
            ),
        )
        if not with_keys and host not in {"127.0.0.1", "::1", "localhost"}:
            logging.getLogger(__name__).warning(
                "everybody who reaches %s may use this server; --api-key(s) ask for keys",
                host,
            )
        try:
            run.serve(lambda: _load(engine), options, listening, otlp_traces, ui)
        finally:
            if key is not None:
                admin_key.remove(port, key)


@keys.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="file of keys; made if it does not exist")],
    tenant: Annotated[str, typer.Option(help="whose key it is")],
    admin: Annotated[bool, typer.Option("--admin", help="may administrate the cache")] = False,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="to all routes", rich_help_panel=_LIMITS)
    ] = None,
    prompt_tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="reused ones count too", rich_help_panel=_LIMITS)
    ] = None,
    output_tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="of answers", rich_help_panel=_LIMITS)
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="at a time", rich_help_panel=_LIMITS)
    ] = None,
) -> None:
    """Make a key and show it once; the file keeps its hash. To end a key, delete its line."""
    from kvshare_mm.apps.server.keys import Limits, add_key

    with plain_errors():
        limits = Limits(
            requests_per_minute,
            prompt_tokens_per_minute,
            output_tokens_per_minute,
            concurrent_requests,
        )
        made = add_key(file, tenant, admin, None if limits == Limits() else limits)
        console.print(made, markup=False, highlight=False, soft_wrap=True)


def _named(context: typer.Context) -> dict[str, Any]:
    """The options that stand in the command line."""
    return {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"
        and name not in {"engine", "vllm_options"}
    }


def _load(config: Any) -> Any:
    from kvshare_mm.llm import KVShare

    return KVShare(**config.model_dump())


def _check_installed() -> None:
    from kvshare_mm.errors import ConfigError

    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("the server needs `pip install kvshare-mm[server]`") from error
