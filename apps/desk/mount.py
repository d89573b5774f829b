"""The desk as a page of the server."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr
from fastapi import FastAPI, Response
from gradio.routes import App
from starlette.routing import Mount

from kvshare_mm.apps.desk.page import PICTURES, STYLE, build
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.service import Service
from kvshare_mm.errors import KVShareError
from kvshare_mm.llm import KVShare

MAX_UPLOAD = "20mb"

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" '
    'rx="4" fill="#3b82d6"/><path d="M3 6h10M3 10h6" stroke="#fff" stroke-width="2"/></svg>'
)


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"])


def mount(app: FastAPI, service: Service, path: str) -> Callable[[], None]:
    """Put the desk under `path` of an application.

    Where keys are asked for, the desk asks for one too: a tenant's name and a key of it.

    Returns:
        What lets go of the pages that are open in browsers: each holds a stream that would keep a
        server from ending.
    """

    def llm() -> KVShare:
        try:
            return service.llm
        except ApiError as error:
            raise KVShareError(str(error)) from error

    def knows(tenant: str, key: str) -> bool:
        caller = service.keys.caller(key)
        return caller is not None and caller.tenant == tenant

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        """Browsers ask for it at the server's root, wherever the page is."""
        return Response(_ICON, media_type="image/svg+xml")

    gr.mount_gradio_app(
        app,
        build(llm),
        path,
        auth=knows if service.keys.required else None,
        auth_message="Your tenant's name, and a key of it.",
        css_paths=[STYLE],
        allowed_paths=[str(PICTURES)],
        theme=theme(),
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
    )
    [desk] = [r.app for r in app.routes if isinstance(r, Mount) and isinstance(r.app, App)]
    stop: Callable[[], None] = desk.stop_event.set
    return stop
