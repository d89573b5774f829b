"""The desk as a page of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import gradio as gr
from fastapi import FastAPI, Response
from gradio.routes import App
from starlette.routing import Mount

from kvshare_mm.apps.desk.door import Door
from kvshare_mm.apps.desk.events import Desk
from kvshare_mm.apps.desk.limits import DeskLimits
from kvshare_mm.apps.desk.page import STYLE, build
from kvshare_mm.apps.desk.uploads import Uploads
from kvshare_mm.apps.desk.visitors import Visitors
from kvshare_mm.apps.server.service import Service
from kvshare_mm.errors import ConfigError

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" '
    'rx="4" fill="#3b82d6"/><path d="M3 6h10M3 10h6" stroke="#fff" stroke-width="2"/></svg>'
)


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: nothing is fetched from elsewhere. Colours that can be
    read: white on them, and they on white, have a contrast of at least 4.5. Panels and fields can
    be told from what is below them: the edge of a field has a contrast of at least 3."""
    fonts = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]
    colours = {
        "body_background_fill": "*neutral_100",
        "input_border_color": "*neutral_500",
        "input_border_width": "1px",
        "checkbox_border_color": "*neutral_500",
        "checkbox_label_border_color": "*neutral_300",
        "checkbox_label_border_width": "1px",
        "block_title_background_fill": "transparent",
        "block_label_background_fill": "transparent",
        "block_title_text_color": "*neutral_600",
        "block_label_text_color": "*neutral_600",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
        "button_secondary_background_fill_hover": "*neutral_200",
        "button_secondary_text_color_hover": "*neutral_900",
        "checkbox_label_background_fill_selected": "*primary_600",
        "checkbox_background_color_selected": "*primary_700",
        "input_placeholder_color": "*neutral_500",
    }
    dark = {
        "body_background_fill": "*neutral_950",
        "input_border_color": "*neutral_400",
        "checkbox_border_color": "*neutral_400",
        "checkbox_label_border_color": "*neutral_600",
        "block_title_text_color": "*neutral_300",
        "block_label_text_color": "*neutral_300",
        "button_secondary_background_fill_hover": "*neutral_500",
        "button_secondary_text_color_hover": "white",
        "input_placeholder_color": "*neutral_400",
    }
    colours |= {f"{name}_dark": dark.get(name, colour) for name, colour in colours.items()}
    base = gr.themes.Soft(
        spacing_size=gr.themes.sizes.spacing_sm, font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    return base.set(**colours)


def as_launched(page: gr.Blocks) -> gr.Blocks:
    """A page that checks paths as one does that was launched.

    Gradio lets a page that was not launched read any file, for scripts; and it never counts a
    mounted page as launched.
    """
    if not hasattr(page, "has_launched"):
        raise ConfigError("this version of Gradio keeps no account of what was launched")
    page.has_launched = page.is_running = True
    return page


def mount(
    app: FastAPI, service: Service, path: str, limits: DeskLimits | None = None
) -> Callable[[], None]:
    """Put the desk under `path` of an application.

    Where keys are asked for, the desk asks for one too: a tenant's name and a key of it.

    Returns:
        What lets go of the pages that are open in browsers: each holds a stream that would keep a
        server from ending.
    """
    limits = limits or DeskLimits()
    uploads = Uploads(limits)
    visitors = Visitors(limits, uploads, service.keys.caller)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        """Browsers ask for it at the server's root, wherever the page is."""
        return Response(_ICON, media_type="image/svg+xml")

    desk = Desk(service, visitors, uploads, limits, path)
    page = build(desk, logout=service.keys.required).queue(max_size=limits.all_streams)
    # What Gradio remembers of each open page.
    page.state_session_capacity = limits.visitors * limits.pages
    gr.mount_gradio_app(
        app,
        page,
        path,
        css_paths=[STYLE],
        theme=theme(),
        footer_links=[],
        max_file_size=limits.upload_bytes,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )
    as_launched(page)
    [(mounted, inner)] = [
        (route, route.app)
        for route in app.routes
        if isinstance(route, Mount) and isinstance(route.app, App)
    ]
    clicks = {number: len(function.inputs) for number, function in page.fns.items()}
    mounted.app = Door(inner, path, clicks, service.keys, visitors, uploads, limits)
    life = app.router.lifespan_context

    @asynccontextmanager
    async def sweeping(application: FastAPI) -> AsyncIterator[Any]:
        task = asyncio.create_task(visitors.keep_sweeping())
        try:
            async with life(application) as state:
                yield state
        finally:
            task.cancel()

    app.router.lifespan_context = sweeping

    def let_go() -> None:
        visitors.end_streams()
        inner.stop_event.set()

    return let_go
