"""``/v1/cache``: administration of stored requests. The gate lets only administrators in."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BeforeValidator

from kvshare_mm.apps.server.chat import ERRORS
from kvshare_mm.apps.server.errors import ApiError, clean
from kvshare_mm.apps.server.generation import request_options
from kvshare_mm.apps.server.json_bodies import json_route
from kvshare_mm.apps.server.keys import Caller
from kvshare_mm.apps.server.schema import ClearBody, LookupBody, PinBody
from kvshare_mm.apps.server.scope import scope
from kvshare_mm.apps.server.service import Service
from kvshare_mm.reuse.admin import DonorInfo


def _digits(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,20}", value):
        raise ValueError("digits alone")
    return value


# Blanks and the like around a number are none of it.
_DIGITS = BeforeValidator(_digits)


def router(service: Service) -> APIRouter:
    """The routes, for one service."""
    routes = APIRouter(
        prefix="/v1/cache", responses=ERRORS, route_class=json_route(service.lines.parsing)
    )

    def told(info: DonorInfo) -> dict[str, Any]:
        return {**asdict(info), "age_s": round(time.time() - info.created_s, 3)}

    def missing(donor_id: str) -> ApiError:
        return ApiError(404, f"there is no donor {donor_id!r}", "donor_id")

    @routes.get("")
    async def stats() -> dict[str, Any]:
        """Counters since the start and sizes now."""
        stats = await service.prepared(service.llm.stats)
        return {**stats, "scope": service.options.scope}

    @routes.get("/donors")
    async def donors(
        namespace: str | None = None,
        limit: Annotated[int, _DIGITS, Query(ge=1, le=1000)] = 100,
        offset: Annotated[int, _DIGITS, Query(ge=0, le=2**31)] = 0,
    ) -> dict[str, Any]:
        """Stored requests, the newest first; never what they say."""
        found = await service.prepared(service.cache.list, namespace)
        shown = found[offset : offset + limit]
        return {"object": "list", "total": len(found), "data": [told(info) for info in shown]}

    @routes.get("/families")
    async def families(namespace: str | None = None) -> dict[str, Any]:
        """What audits found, by root of the tree; those audited most first."""
        found = await service.prepared(service.cache.families, namespace)
        return {"object": "list", "total": len(found), "data": [asdict(f) for f in found]}

    @routes.get("/donors/{donor_id}")
    async def donor(donor_id: str) -> dict[str, Any]:
        """One stored request; its text only where the operator exposes it."""
        info = await service.prepared(service.cache.get, donor_id)
        if info is None:
            raise missing(donor_id)
        reply = told(info)
        if service.options.expose_prompts:
            reply["text"] = clean(await service.prepared(service.cache.text, donor_id) or "")
        return reply

    @routes.get("/tree")
    async def tree(namespace: str | None = None) -> dict[str, Any]:
        """Which request was edited from which: trees of id, tokens and children."""
        found = await service.prepared(service.cache.list, namespace)
        # Flat, with parents: a chain of a thousand edits would be too deep to read as JSON.
        nodes = [
            {
                "donor_id": info.donor_id,
                "parent": info.parent,
                "depth": info.depth,
                "num_tokens": info.num_tokens,
                "num_owned": info.num_owned,
            }
            for info in reversed(found)
        ]
        return {"object": "list", "total": len(nodes), "data": nodes}

    @routes.post("/donors/{donor_id}/pin")
    async def pin(donor_id: str, body: PinBody) -> dict[str, Any]:
        """Keep a donor from eviction for some seconds."""
        if not await service.prepared(service.cache.pin, donor_id, body.ttl_s):
            raise missing(donor_id)
        return {"donor_id": donor_id, "pinned_s": body.ttl_s}

    @routes.delete("/donors/{donor_id}/pin")
    async def unpin(donor_id: str) -> dict[str, Any]:
        """Let a donor be evicted again."""
        if not await service.prepared(service.cache.unpin, donor_id):
            raise ApiError(404, f"donor {donor_id!r} is not pinned", "donor_id")
        return {"donor_id": donor_id, "pinned_s": 0}

    @routes.delete("/donors/{donor_id}")
    async def delete(donor_id: str) -> dict[str, Any]:
        """Delete a donor from all tiers."""
        if not await service.prepared(service.cache.delete, donor_id):
            raise missing(donor_id)
        return {"donor_id": donor_id, "deleted": True}

    @routes.post("/clear")
    async def clear(body: ClearBody) -> dict[str, Any]:
        """Delete the donors of a namespace, or all."""
        # What is wrong with a salt is told even where another field decides.
        options = scope(service.options.scope, Caller(body.tenant or ""), body.cache_salt)
        if body.all:
            return {"deleted": await service.prepared(service.cache.clear)}
        if body.namespace is None and body.tenant is None and body.cache_salt is None:
            raise ApiError(
                400, "name a namespace, a tenant or a cache_salt, or say all", "namespace"
            )
        name = body.namespace
        if name is None:
            name = service.llm.namespace(options.cache_salt)
        deleted = await service.prepared(service.cache.clear, name)
        return {"deleted": deleted, "namespace": clean(name)}

    @routes.post("/lookup")
    async def lookup(body: LookupBody) -> dict[str, Any]:
        """What a request would reuse if it came now, and why not more; nothing is run."""
        body.check(service.options.model_name)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "either prompt or messages", "prompt")
        prompt: Any = body.prompt
        if body.messages is not None:
            prompt = await service.with_media(body.messages, body.tenant)
        options = request_options(service, Caller(body.tenant), body.cache_salt, body.kvshare)
        found = await service.lines.of(prompt).run(body.tenant, service.llm.lookup, prompt, options)
        namespace = service.llm.namespace(options.cache_salt)
        if found is None:
            return {"namespace": namespace, "exact": 0, "similar": 0, "declined": "reuse_off"}
        plan = found.plan
        return {
            "namespace": namespace,
            "tokens": plan.num_tokens,
            "exact": plan.num_exact,
            "similar": plan.num_reused,
            "repaired": len(plan.repair),
            "missing": len(plan.placeholders),
            "donors": list(plan.donors),
            "declined": plan.declined,
            "lookup_s": found.lookup,
            "plan_s": found.planning,
        }

    return routes
