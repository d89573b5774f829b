"""Runs the server until it is told to stop."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn

from kvshare_mm.apps.server.app import create_app
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.service import Service
from kvshare_mm.apps.server.sharing import in_words
from kvshare_mm.apps.server.tracing import Tracer
from kvshare_mm.errors import ConfigError
from kvshare_mm.llm import KVShare

logger = logging.getLogger(__name__)

UI_PATH = "/ui"

# Beyond the time that requests get to end, the process has so long to tidy up.
MARGIN_S = 10.0
_SWITCH_INTERVAL_S = 0.0005


class _Server(uvicorn.Server):
    """Says that it ends, which may take as long as the requests in flight.

    Args:
        config: of the server.
        on_stop: called first when it ends.
        service: told that the end has begun.
    """

    def __init__(
        self, config: uvicorn.Config, on_stop: Callable[[], None], service: Service
    ) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self._service = service
        self._ends = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._end()
        super().handle_exit(sig, frame)

    def _end(self) -> None:
        """From now on the process ends in time, whatever hangs: this needs no thread of Python's,
        and no lock."""
        if not self._ends:
            self._ends = True
            self._service.ends()
            limit = self._service.options.shutdown_timeout_s + MARGIN_S
            faulthandler.dump_traceback_later(limit, exit=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end()
        self._on_stop()
        await asyncio.sleep(0)  # what was let go ends
        logger.info(
            "stopping; %d requests in flight have %d s to end",
            len(self.server_state.tasks),
            self.config.timeout_graceful_shutdown or 0,
        )
        await super().shutdown(sockets)
        logger.info("stopped")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is known before a model is loaded.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return listening


def serve(
    load: Callable[[], KVShare],
    options: ServerOptions,
    listening: socket.socket,
    traces: str | None = None,
    ui: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM; then let requests in flight end, and keep donors.

    From the signal on, the process has ``shutdown_timeout_s`` and `MARGIN_S` more; what hangs then
    is told on stderr, and the process ends with status 1.

    Args:
        load: makes the engine.
        options: of the server.
        listening: a bound socket.
        traces: OTLP endpoint, or None.
        ui: also show the customer-service desk under ``/ui``.

    Raises:
        ConfigError: keys or traces cannot be used.
        Exception: what `load` raised.
    """
    service = Service(load, options, Tracer(traces, options.model_name))
    holder: list[uvicorn.Server] = []

    def give_up() -> None:
        holder[0].should_exit = True

    app = create_app(service, give_up, UI_PATH if ui else None)
    on_stop: Callable[[], None] = lambda: None  # noqa: E731
    if ui:
        from kvshare_mm.apps.desk.mount import mount

        on_stop = mount(app, service, UI_PATH)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(options.shutdown_timeout_s)),
        timeout_keep_alive=30,
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d", shown, port)
    logger.info("%s", in_words(options.sharing))
    if ui:
        logger.info("desk on http://%s:%d%s", shown, port, UI_PATH)
    holder.append(_Server(config, on_stop, service))
    # The engine's thread computes without a pause; a token should not wait 5 ms for its turn.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # uvicorn sends itself the signal again once it has ended, which would leave no time to tidy up.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with suppress(KeyboardInterrupt):
        holder[0].run(sockets=[listening])
    if service.failure is not None:
        raise service.failure
