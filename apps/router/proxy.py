"""Sends each request where its donor is, and to another replica if that one is not there."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import quote

import httpcore2
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from kvshare_mm.apps.router.bodies import Body, Room
from kvshare_mm.apps.router.headers import is_passed_on, to_replica
from kvshare_mm.apps.router.memory import Memory
from kvshare_mm.apps.router.metrics import RouterMetrics
from kvshare_mm.apps.router.plan import Choice, choose
from kvshare_mm.apps.router.prompt import PATHS, Prompt, prompt_of
from kvshare_mm.apps.router.replicas import Replica, typical_seconds
from kvshare_mm.apps.router.upstream import Asked, Client, LostError, Whole, pass_on
from kvshare_mm.apps.server.answering import unless_gone
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.json_bodies import parsed
from kvshare_mm.apps.server.lines import Line

logger = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
# Larger bodies are read in a thread.
_LARGE = 64 << 10
# A request that two replicas did not survive is not tried on a third.
_MOST_LOST = 2


class Proxy:
    """ASGI application: all of the API that replicas answer one by one.

    Args:
        replicas: where requests go.
        pool: connections to them.
        memory: what was sent to whom.
        metrics: what is counted.
        room: for bodies.
        line: threads in which large bodies are read.
        timeout_s: for a replica to say something.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        pool: httpcore2.AsyncConnectionPool,
        memory: Memory,
        metrics: RouterMetrics,
        room: Room,
        line: Line,
        timeout_s: float,
    ) -> None:
        self._replicas = replicas
        self._pool = pool
        self._memory = memory
        self._metrics = metrics
        self._room = room
        self._line = line
        self._timeout_s = timeout_s
        self._draw = random.Random()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if not is_passed_on(path):
            raise _refusal(path)
        scope["state"]["route"] = path if path in PATHS else "other"
        if scope["method"] not in _METHODS:
            raise ApiError(405, f"there is nothing here for {scope['method'][:20]}")
        body = Body(self._room)
        try:
            await body.read(receive)
            query = scope["query_string"].decode("ascii")
            asked = Asked(
                scope["method"],
                # What was looked at is what is sent, however it was spelt.
                quote(path, safe="/:@~+") + (f"?{query}" if query else ""),
                to_replica(scope["headers"], scope["state"]["request_id"]),
                body,
            )
            with suppress(OSError):  # the client went while it was written to
                await unless_gone(receive, scope, self._answer(scope, asked, Client(send)))
        except ClientDisconnect:
            scope["state"]["client_gone"] = True
        finally:
            body.release()

    async def _answer(self, scope: Scope, asked: Asked, client: Client) -> None:
        """Ask replicas, each once at most, until one answers. Raises ApiError: none did.

        A client that has a head gets no error: the end is missing, and the connection says so.
        """
        begun = time.perf_counter()
        prompt = await self._prompt(scope, asked)
        refused: list[Whole] = []
        tried: list[Replica] = []  # another may get the number of one that left
        lost, slow, told = 0, 0, False
        while left := self._left(tried, told and not client.headed):
            choice = self._choice(prompt, left)
            if not tried:
                self._metrics.decisions.observe(time.perf_counter() - begun)
            replica = next(r for r in left if r.number == choice.replica)
            tried.append(replica)
            answers = replica.healthy
            try:
                reply = await self._ask(prompt, replica, choice, asked, client, len(tried) > 1)
            except LostError as error:
                logger.warning("replica %d was lost: %s", replica.number, error)
                self._metrics.lost.labels(str(replica.number), str(error.begun).lower()).inc()
                lost += error.reached
                slow += error.slow
                if error.begun or (client.headed and lost == _MOST_LOST):
                    return
                if slow == _MOST_LOST and not client.headed:
                    break
                if lost == _MOST_LOST:
                    raise ApiError(502, "no replica survived this request", code="lost") from error
                continue
            except ApiError:
                if refused:
                    break
                raise
            if reply is None:
                return
            refused.append(reply)
            told |= answers and not reply.is_leaving
            if reply.is_final:
                break
        if client.headed:
            return
        if slow and not refused:
            raise ApiError(504, "replicas took the request too slowly", code="timeout")
        if not refused:
            raise ApiError(503, "no replica answers", code="no_replica", retry_after=2)
        # Where some are full, the client waits for one of them.
        await next((r for r in refused if r.status == 429), refused[-1]).send(client.send)

    def _left(self, tried: Sequence[Replica], told: bool) -> list[Replica]:
        """Replicas that can still be asked: those that are healthy and have not just failed several
        requests, or else the healthy ones, or where nobody is, those that are not: a busy machine
        answers late to checks, and answers requests.

        Args:
            told: one that is healthy has said that it has no room. That is passed on: others may
                take long to say nothing.
        """
        left = [r for r in self._replicas if r not in tried]
        healthy = [r for r in left if r.healthy]
        return [r for r in healthy if not r.rests] or healthy or ([] if told else left)

    async def _ask(
        self,
        prompt: Prompt | None,
        replica: Replica,
        choice: Choice,
        asked: Asked,
        client: Client,
        again: bool,
    ) -> Whole | None:
        reason = "retry" if again else choice.reason
        self._metrics.requests.labels(str(replica.number), reason).inc()
        # Known at once: whoever asks the same a moment later follows.
        known = self._remember(prompt, replica)
        flight = replica.begin(choice)
        try:
            return await pass_on(self._pool, replica, asked, flight, client, self._timeout_s)
        except LostError as error:
            if error.absent:
                replica.healthy = False  # until it says otherwise
            raise
        finally:
            flight.end()
            if flight.answered:
                self._remember(prompt, replica, answered=True)
            elif known:
                self._memory.forget(known)

    def _choice(self, prompt: Prompt | None, left: Sequence[Replica]) -> Choice:
        shares: dict[int, float] = {}
        if prompt is not None and prompt.reads:
            try:
                shares = self._memory.shares(prompt, [r.number for r in left])
            except Exception:
                logger.exception("earlier requests could not be looked up")
        typical = typical_seconds(left)
        standings = [r.standing(shares.get(r.number, 0.0), typical) for r in left]
        return choose(0 if prompt is None else len(prompt.words), standings, self._draw)

    def _remember(
        self, prompt: Prompt | None, replica: Replica, answered: bool = False
    ) -> str | None:
        """What is to be forgotten if the replica does not answer; None: nothing."""
        if prompt is None or not prompt.stored:
            return None
        try:
            return self._memory.add(prompt, replica.number, answered)
        except Exception:
            logger.exception("a request is not remembered")
            return None

    async def _prompt(self, scope: Scope, asked: Asked) -> Prompt | None:
        """What the request is alike to; None: nothing, or it cannot be read."""
        if scope["path"] not in PATHS or asked.method != "POST":
            return None
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        authorization = b",".join(sent).decode("latin-1")
        content = asked.body.content

        def read() -> Prompt | None:
            return prompt_of(parsed(content), authorization)

        try:
            if len(content) <= _LARGE:
                return read()
            tenant = hashlib.blake2b(authorization.encode(), digest_size=16).hexdigest()
            found: Prompt | None = await self._line.run(tenant, read)
            return found
        except (ValueError, ApiError) as error:
            logger.debug("a body is passed on unread: %s", error)
        except Exception:
            logger.exception("a body is passed on unread")
        return None


def _refusal(path: str) -> ApiError:
    if path == "/v1/cache" or path.startswith("/v1/cache/"):
        return ApiError(
            403, "a router administrates no cache: ask each replica", code="not_through_a_router"
        )
    return ApiError(404, f"there is no {path} here")
