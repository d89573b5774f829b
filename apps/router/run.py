"""Runs a router until it is told to stop."""

from __future__ import annotations

import logging
import socket

from kvshare_mm.apps.router.app import MOST_IDLE, create_app
from kvshare_mm.apps.router.fleet import Fleet
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.run import Server, address, until_stopped

logger = logging.getLogger(__name__)


def serve(
    fleet: Fleet,
    options: ServerOptions,
    listening: socket.socket,
    max_requests: int,
    max_held_bytes: int,
) -> None:
    """Route until SIGINT or SIGTERM; then let requests in flight end. See `app.create_app`."""
    app, metrics = create_app(fleet, options, max_requests, max_held_bytes)
    logger.info("listening on %s", address(listening, options))
    for replica in fleet.replicas:
        logger.info("replica %d is %s", replica.number, replica.origin)
    # A client's connection and one to a replica, and those that are idle.
    server = Server(app, options, metrics.registry, files_each=2, other_files=MOST_IDLE)
    until_stopped(server, listening)
