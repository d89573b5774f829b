"""`kvshare desk`."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvshare_mm.apps.openmp import wait_asleep
from kvshare_mm.apps.terminal import plain_errors
from kvshare_mm.models.names import refuse_unknown

console = Console()
_HERE = "a model in this process"
_ELSEWHERE = "a model elsewhere"


def desk(
    model: Annotated[
        str | None,
        typer.Argument(
            help="hub name, folder, .gguf file, or an embedded model; default: smollm2; with "
            "--url: its name there, default: the first"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 7860,
    store_dir: Annotated[
        Path | None,
        typer.Option(help="keep donors in this folder over a restart", rich_help_panel=_HERE),
    ] = None,
    media_embedder: Annotated[
        str | None,
        typer.Option(
            help="CLIP model that finds pictures that look alike, for showing: tiny-clip, a folder "
            "or ARCHITECTURE/WEIGHTS; default: none",
            rich_help_panel=_HERE,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="ask this running server: `kvshare serve`, or vLLM with KVShare",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="KVSHARE_API_KEY",
            help="API key of that server; better in the variable, which `ps` does not show",
            rich_help_panel=_ELSEWHERE,
        ),
    ] = None,
) -> None:
    """Open the customer-service desk: two customers, one shop, shared KV cache."""
    with plain_errors():
        from kvshare_mm.errors import ConfigError

        here = model or "smollm2"
        if url is None:
            refuse_unknown(here)
        wait_asleep()
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            import gradio  # noqa: F401

            from kvshare_mm.apps.desk import alone
        except ImportError as error:
            raise ConfigError("the desk needs `pip install kvshare-mm[demo]`") from error
        from kvshare_mm.apps.server import logs

        logs.configure(False, logging.getLogger().getEffectiveLevel())
        if url is None:
            model = here
            console.print(f"Loading [bold]{escape(here)}[/] ...")
            load = partial(alone.local, here, store_dir, media_embedder)
        elif store_dir or media_embedder:
            raise ConfigError("--store-dir and --media-embedder are the server's own, not --url's")
        else:
            console.print("Asking the endpoint ...")
            load = partial(alone.elsewhere, url, model, api_key)
        alone.run(load, model or "endpoint", host, port)
