"""The desk without a server."""

from __future__ import annotations

from pathlib import Path

from kvshare_mm.apps.desk.mount import MAX_UPLOAD, theme
from kvshare_mm.apps.desk.page import PICTURES, STYLE, build
from kvshare_mm.apps.server.run import bind
from kvshare_mm.llm import KVShare


def run(model: str, host: str, port: int, store_dir: Path | None) -> None:
    """Serve the desk until it is interrupted."""
    with bind(host, port) as probe:  # Gradio would silently take another port
        port = probe.getsockname()[1]
    with KVShare(model, store_dir=store_dir, embedder=None) as llm:
        page = build(lambda: llm)
        page.launch(
            server_name=host,
            server_port=port,
            css_paths=[STYLE],
            allowed_paths=[str(PICTURES)],
            theme=theme(),
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            show_error=True,
            ssr_mode=False,
            enable_monitoring=False,
            quiet=False,
        )
