"""Which requests may share KV: tenant and ``cache_salt`` become the salt of the engine.

The engine never shares across salts. The mode's name is part of the salt, so a client cannot spell
a salt that another mode, or another tenant, would make.
"""

from __future__ import annotations

import json
import re

from kvshare_mm.apps.server.keys import Caller
from kvshare_mm.apps.server.options import Scope
from kvshare_mm.config import RequestOptions
from kvshare_mm.errors import InvalidRequestError

_SALT = re.compile(r"[^@/\\\0]{1,128}", re.DOTALL)


def scope(mode: Scope, caller: Caller, salt: str | None) -> RequestOptions:
    """Options of a request that keep it where it belongs.

    Args:
        salt: the request's ``cache_salt``, by vLLM's rules: 1 to 128 characters, none of ``@/\\``
            and NUL.

    Raises:
        InvalidRequestError: the salt is malformed.
    """
    if salt is not None and not _SALT.fullmatch(salt):
        raise InvalidRequestError(
            "cache_salt has 1 to 128 characters and none of '@', '/', '\\' and NUL", "cache_salt"
        )
    if mode == "tenant":
        return RequestOptions(cache_salt=json.dumps(["tenant", caller.tenant, salt]))
    if salt is not None:
        return RequestOptions(cache_salt=json.dumps(["salt", salt]))
    if mode == "salt":
        # Nobody to share with: nothing is looked up and nothing stored.
        return RequestOptions(reuse="off", store=False)
    return RequestOptions()


def in_words(mode: Scope) -> str:
    """What a mode means, for the line at the start."""
    return {
        "tenant": "sharing within each tenant; a cache_salt divides a tenant further",
        "salt": "sharing only between requests that name the same cache_salt",
        "global": "sharing between ALL requests; those with a cache_salt are apart",
    }[mode]
