"""The ASGI application."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.middleware.cors import CORSMiddleware

import kvshare_mm
from kvshare_mm.apps.server import cache_admin, chat, completions, embeddings, errors, info
from kvshare_mm.apps.server.gate import Gate
from kvshare_mm.apps.server.service import Service

logger = logging.getLogger(__name__)


def create_app(
    service: Service,
    on_failure: Callable[[], None] = lambda: None,
    ui_path: str | None = None,
    api: bool = True,
) -> FastAPI:
    """The application of a service.

    Args:
        service: loaded when the application starts, closed when it ends.
        on_failure: called if the model cannot be loaded.
        ui_path: where pages with a login of their own will be mounted, or None.
        api: whether there is more than those pages; if not, the root leads to them.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async def load() -> None:
            started = time.perf_counter()
            try:
                await service.load()
                taken = time.perf_counter() - started
                logger.info("%s is ready after %.1f s", service.options.model_name, taken)
            except Exception as error:
                logger.error("the model cannot be loaded: %s", error)
                on_failure()

        loading = asyncio.create_task(load())
        try:
            yield
        finally:
            # What it opens should be closed; but a thread cannot be stopped.
            await asyncio.wait({loading}, timeout=service.left_s)
            if not loading.done():
                logger.warning("ending while the model is still loading")
            await service.close()

    app = FastAPI(
        title="KVShare-MM",
        version=kvshare_mm.__version__,
        description="OpenAI's API, with KV cache shared between similar requests.",
        lifespan=life,
        redoc_url=None,
        openapi_url="/openapi.json" if api else None,
    )
    errors.install(app)
    for module in (chat, completions, embeddings, info, cache_admin) if api else ():
        app.include_router(module.router(service))
    if not api:
        app.add_api_route("/", lambda: RedirectResponse(f"{ui_path}/"), include_in_schema=False)
    app.add_middleware(
        Gate,
        options=service.options,
        keys=service.keys,
        meters=service.meters,
        registry=service.metrics.registry,
        ui_path=ui_path,
    )
    if service.options.cors_origins:
        # Outside the gate: a browser asks without a key first, and may read why it was refused.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app
