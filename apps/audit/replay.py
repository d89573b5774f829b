"""A log served several ways: with reuse, with identical beginnings only, and in full."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from kvshare_mm import __version__
from kvshare_mm.apps.audit.log import Asked
from kvshare_mm.apps.audit.servers import How, Refused, Server
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.config import RequestOptions

FULL, PREFIX, AGAIN, BOUND = "full", "prefix", "again", "max_divergence "
Result = dict[str, Any]
"""Of one request: `Reply` as a dict by way, or ``{"refused": why}``.

`AGAIN` is there if an answer changed: full recompute once more, in other chunks.
"""


def ways_of(bounds: Sequence[float], repair: str | None) -> dict[str, How]:
    """How each replay reuses, by its name.

    Args:
        bounds: a replay with reuse for each ``max_divergence``; none: one, as the server has it.
        repair: of replays with reuse; None: as the server has it.

    Raises:
        InvalidRequestError: what no request may ask.
    """
    own: How = {"reuse": "similar", **({"repair": repair} if repair else {})}
    ways: dict[str, How] = {f"{BOUND}{b:g}": {**own, "max_divergence": b} for b in bounds}
    for how in (own, *ways.values()):
        RequestOptions(**how)
    ways = ways or {"with reuse": own}
    return {**ways, PREFIX: {"reuse": "exact"}, FULL: {"reuse": "off", "store": False}}


def settings(log: Sequence[Asked], model: str, where: str, ways: dict[str, How]) -> list[Any]:
    """What decides the results, JSON-ready: for journals."""
    return [__version__, "audit", model, where, ways, [asdict(asked) for asked in log]]


def replay(
    server: Server,
    log: Sequence[Asked],
    ways: dict[str, How],
    journal: Journal,
    on_done: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Serve every request every way, in the log's order.

    The ways take turns request by request, each with donors of its own, so that a machine that
    becomes slower does so for all. Requests that the journal knows are served again where they
    become donors, for those behind them; what was measured of them stays.

    Returns:
        A result a request.
    """
    # Earlier audits must not be found: their donors may still be there.
    run = f"audit-{uuid.uuid4().hex}"
    results: list[Result] = []
    for i, asked in enumerate(log):
        known = journal.get(str(asked.line))
        result: Result = {}
        names = list(ways)[i % len(ways) :] + list(ways)[: i % len(ways)]
        try:
            for name in names if known is None or "refused" not in known else ():
                stored = ways[name].get("store", True)
                if known is None or stored:
                    # vLLM's own prefix cache knows no `reuse` and no `store`: it is left nothing.
                    salt = f"{run}-{name}-{'' if stored else asked.line}-{asked.salt}"
                    result[name] = asdict(server.ask(asked, ways[name], salt))
            if known is None and any(r["text"] != result[FULL]["text"] for r in result.values()):
                salt = f"{run}-{AGAIN}-{asked.line}"
                for how in ({"reuse": "off"}, {"reuse": "exact"}):
                    result[AGAIN] = asdict(server.ask(asked, how, salt))
        except Refused as refused:
            result = {"refused": str(refused)}
        if known is None:
            journal.put(str(asked.line), result)
        results.append(result if known is None else known)
        on_done()
    return results
