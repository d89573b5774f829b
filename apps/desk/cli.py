"""`kvshare ui`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvshare_mm.apps.openmp import wait_asleep
from kvshare_mm.apps.terminal import plain_errors

console = Console()


def ui(
    model: Annotated[
        str, typer.Argument(help="hub name, folder, .gguf file, or an embedded model")
    ] = "smollm2",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 7860,
    store_dir: Annotated[
        Path | None, typer.Option(help="keep donors in this folder over a restart")
    ] = None,
) -> None:
    """Open the customer-service desk: two customers, one shop, shared KV cache."""
    with plain_errors():
        from kvshare_mm.errors import ConfigError

        wait_asleep()
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        try:
            import gradio  # noqa: F401

            from kvshare_mm.apps.desk import alone
        except ImportError as error:
            raise ConfigError("the desk needs `pip install kvshare-mm[demo]`") from error
        from kvshare_mm.apps.server import logs

        logs.configure(False, logging.getLogger().getEffectiveLevel())
        console.print(f"Loading [bold]{escape(model)}[/] ...")
        alone.run(model, host, port, store_dir)
