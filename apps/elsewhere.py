"""Asking a server that runs elsewhere: KVShare's own, or vLLM's with KVShare in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def api_of(url: str, key: str | None) -> dict[str, Any]:
    """A client's options for a server's API; paths are relative to ``/v1``.

    Args:
        url: of the server, with or without ``/v1``.
        key: API key, or None.
    """
    return {
        "base_url": url.rstrip("/").removesuffix("/v1") + "/v1",
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
    }


def reusing(how: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a body that say how it reuses: KVShare's server reads the first, vLLM's the second,
    and each leaves the other alone."""
    return {"kvshare": dict(how), "kv_transfer_params": {"kvshare": dict(how)}}


def tells_of_reuse(reply: Mapping[str, Any]) -> bool:
    """Whether there is KVShare in the server that a reply is from."""
    return bool(reply.get("kvshare") or (reply.get("kv_transfer_params") or {}).get("kvshare"))
