"""The desk as a page of the server."""

from __future__ import annotations

import gradio as gr
from fastapi import FastAPI

from kvshare_mm.apps.desk.page import STYLE, build
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.service import Service
from kvshare_mm.errors import KVShareError
from kvshare_mm.llm import KVShare

MAX_UPLOAD = "20mb"


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"])


def mount(app: FastAPI, service: Service, path: str) -> FastAPI:
    """The application with the desk under `path`.

    Where keys are asked for, the desk asks for one too: a tenant's name and a key of it.
    """

    def llm() -> KVShare:
        try:
            return service.llm
        except ApiError as error:
            raise KVShareError(str(error)) from error

    def knows(tenant: str, key: str) -> bool:
        caller = service.keys.caller(key)
        return caller is not None and caller.tenant == tenant

    return gr.mount_gradio_app(
        app,
        build(llm),
        path,
        auth=knows if service.keys.required else None,
        auth_message="Your tenant's name, and a key of it.",
        css_paths=[STYLE],
        theme=theme(),
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
    )
