"""The methods that are compared: one file each, and one line each in the table below."""

from __future__ import annotations

from kvshare_mm.apps.bench.methods.base import AnswerMethod, AnswerStore, AnyMethod, Method
from kvshare_mm.apps.bench.methods.cacheblend import CACHEBLEND
from kvshare_mm.apps.bench.methods.deviation import DEVIATION
from kvshare_mm.apps.bench.methods.epic import EPIC
from kvshare_mm.apps.bench.methods.full import FULL
from kvshare_mm.apps.bench.methods.gptcache import GPTCACHE
from kvshare_mm.apps.bench.methods.kvshare import KVSHARE
from kvshare_mm.apps.bench.methods.placeholders import PLACEHOLDERS
from kvshare_mm.apps.bench.methods.prefix import PREFIX
from kvshare_mm.errors import ConfigError
from kvshare_mm.repair import make_policy

__all__ = [
    "ANSWER_METHODS",
    "METHODS",
    "AnswerMethod",
    "AnswerStore",
    "AnyMethod",
    "Method",
    "pick",
    "pick_any",
]

METHODS: dict[str, Method] = {
    m.name: m for m in (FULL, PREFIX, PLACEHOLDERS, CACHEBLEND, EPIC, DEVIATION, KVSHARE)
}
ANSWER_METHODS: dict[str, AnswerMethod] = {m.name: m for m in (GPTCACHE,)}

_POLICY = "repair="


def pick(names: str) -> list[Method]:
    """Methods that reuse KV, by comma-separated names, each once.

    A method may also be a repair policy itself, as in ``repair=window:8``.

    Raises:
        ConfigError: there is no such method or policy, or it reuses answers instead of KV.
    """
    chosen = pick_any(names)
    others = [m.name for m in chosen if isinstance(m, AnswerMethod)]
    if others:
        raise ConfigError(f"method {others[0]!r} reuses answers, not KV: only tasks can measure it")
    return [m for m in chosen if isinstance(m, Method)]


def pick_any(names: str) -> list[AnyMethod]:
    """As `pick`, with methods that reuse answers too. Raises ConfigError."""
    chosen: dict[str, AnyMethod] = {}
    for name in (n.strip() for n in names.split(",")):
        chosen[name] = _method(name)
    return list(chosen.values())


def _method(name: str) -> AnyMethod:
    if name.startswith(_POLICY):
        spec = name.removeprefix(_POLICY)
        try:
            make_policy(spec)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return Method(name, f"repair policy {spec}", "on", spec)
    known: dict[str, AnyMethod] = {**METHODS, **ANSWER_METHODS}
    if name not in known:
        raise ConfigError(f"method {name!r} is none of {', '.join(known)}, repair=POLICY")
    return known[name]
