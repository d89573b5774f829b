"""Runs the server until it is told to stop."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from kvshare_mm.apps.server.connections import Connections, Listener, quiet_about_files, room_for
from kvshare_mm.apps.server.gate import STOPPING
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.protocol import farewell, protocol
from kvshare_mm.apps.server.scope import in_words
from kvshare_mm.errors import ConfigError

if TYPE_CHECKING:
    from kvshare_mm.llm import KVShare

logger = logging.getLogger(__name__)

UI_PATH = "/ui"

# Beyond the time that requests get to end, the process has so long to tidy up.
MARGIN_S = 10.0
_SWITCH_INTERVAL_S = 0.0005
# Connections that wait to be accepted: asyncio tries that often in a row when it has no files.
_BACKLOG = 256


class Server(uvicorn.Server):
    """A server that bounds connections and, when it ends, says so.

    While requests in flight end, those that arrive over open connections are told to come back.

    Args:
        app: what is served.
        options: bounds and deadlines.
        registry: where connections are counted.
        on_stop: called first when it ends.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        registry: CollectorRegistry,
        on_stop: Callable[[], None] = lambda: None,
        files_each: int = 1,
        other_files: int = 0,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",  # `Listener` accepts for it
                http=protocol(options),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=max(1, int(options.shutdown_timeout_s)),
                timeout_keep_alive=options.idle_timeout_s,  # type: ignore[arg-type]
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile=options.ssl_keyfile,
            )
        )
        room = room_for(options.max_connections, files_each, other_files)
        self._connections = Connections(room, options.max_connections_per_client, registry)
        self._on_stop = on_stop
        self._timed = False
        self._limit_s = options.shutdown_timeout_s + MARGIN_S

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """From a signal on the process ends in time, whatever hangs: this needs no thread of
        Python's, and no lock."""
        if not self._timed:
            self._timed = True
            faulthandler.dump_traceback_later(self._limit_s, exit=True)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        quiet_about_files(asyncio.get_running_loop())
        # A client that waits for a handshake of TLS would not understand it.
        last_words = b"" if self.config.is_ssl else farewell()
        await super().startup(
            [Listener(each, self._connections, last_words) for each in sockets or ()]
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        self.lifespan.state[STOPPING] = True
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)  # what was let go ends
        running = set(self.server_state.tasks)
        seconds = self.config.timeout_graceful_shutdown or 0
        logger.info("stopping; %d requests in flight have %d s to end", len(running), seconds)
        deadline = time.monotonic() + seconds
        while not (self.force_exit or running.isdisjoint(self.server_state.tasks)):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        # What has not ended by now is cancelled, and idle connections are closed.
        self.config.timeout_graceful_shutdown = 1
        await super().shutdown(sockets)
        logger.info("stopped")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is known before a model is loaded.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio sends at once only on sockets that it knows to be TCP, and an
    # answer on a connection kept alive would otherwise wait 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return listening


def address(listening: socket.socket, options: ServerOptions) -> str:
    """The URL of a server."""
    host, port = listening.getsockname()[:2]
    scheme = "http" if options.ssl_certfile is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_certificate(certfile: Path | None, keyfile: Path | None) -> None:
    """See that HTTPS will work before a model is loaded.

    Raises:
        ConfigError: the files cannot be used.
    """
    if certfile is None:
        if keyfile is not None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")
        return

    def no_password() -> str:
        raise ConfigError(f"the key in {keyfile or certfile} has a password; take it away")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, no_password)
    except OSError as error:  # ssl.SSLError is one
        named = certfile if keyfile is None else f"{certfile} and {keyfile}"
        raise ConfigError(f"HTTPS cannot be served with {named}: {error}") from error


def until_stopped(server: Server, listening: socket.socket) -> None:
    """Run a server until SIGINT or SIGTERM."""
    # uvicorn sends itself the signal again once it has ended, which would leave no time to tidy up.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def serve(
    load: Callable[[], KVShare],
    options: ServerOptions,
    listening: socket.socket,
    traces: str | None = None,
    ui: bool = False,
    api: bool = True,
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
        api: whether there is more than the desk.

    Raises:
        ConfigError: keys or traces cannot be used.
        Exception: what `load` raised.
    """
    # With them comes torch, which who needs a `Server` alone does not wait for.
    from kvshare_mm.apps.server.app import create_app
    from kvshare_mm.apps.server.service import Service
    from kvshare_mm.apps.server.tracing import Tracer

    service = Service(load, options, Tracer(traces, options.model_name))
    holder: list[Server] = []

    def give_up() -> None:
        holder[0].should_exit = True

    app = create_app(service, give_up, UI_PATH if ui else None, api)
    let_go: Callable[[], None] = lambda: None  # noqa: E731
    if ui:
        from kvshare_mm.apps.desk.mount import mount

        let_go = mount(app, service, UI_PATH)

    def stop() -> None:
        service.ends()
        let_go()

    shown = address(listening, options)
    logger.info("listening on %s", shown)
    if api:
        logger.info("OpenAI's API on %s/v1, its description on %s/docs", shown, shown)
        logger.info("%s", in_words(options.scope))
    if ui:
        logger.info("desk on %s%s", shown, UI_PATH)
    holder.append(Server(app, options, service.metrics.registry, stop))
    # The engine's thread computes without a pause; a token should not wait 5 ms for its turn.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    until_stopped(holder[0], listening)
    if service.failure is not None:
        raise service.failure
