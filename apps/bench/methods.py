"""The methods that are compared, by what they may reuse and what they recompute."""

from __future__ import annotations

from dataclasses import dataclass

from kvshare_mm.engine.prefill import Sharing
from kvshare_mm.errors import ConfigError
from kvshare_mm.repair import RepairPolicy, make_policy


@dataclass(frozen=True, slots=True)
class Method:
    """One way to serve a request."""

    name: str
    sharing: Sharing
    repair: str | None
    about: str

    @property
    def policy(self) -> RepairPolicy | None:
        return make_policy(self.repair) if self.repair else None


METHODS = {
    m.name: m
    for m in (
        Method("full", "off", None, "full recompute"),
        Method("prefix", "exact", None, "prefix caching: the identical beginning only"),
        Method("placeholders", "on", "none", "KVShare v1 (arXiv 2503.16525): nothing repaired"),
        Method(
            "cacheblend", "on", "deviation:0.15", "CacheBlend (2405.16444): top 15% V deviation"
        ),
        Method("epic", "on", "window:16", "EPIC (2410.15332): first 16 tokens of every kept run"),
        Method("kvshare", "on", None, "this project's default policy"),
    )
}


def pick(names: str) -> list[Method]:
    """Methods by comma-separated names. Raises ConfigError for one that does not exist.

    A method may also be a repair policy itself, as in ``repair=window:8``.
    """
    chosen = []
    for name in (n.strip() for n in names.split(",")):
        if name.startswith("repair="):
            spec = name.removeprefix("repair=")
            try:
                make_policy(spec)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            chosen.append(Method(name, "on", spec, f"repair policy {spec}"))
        elif name in METHODS:
            chosen.append(METHODS[name])
        else:
            raise ConfigError(f"method {name!r} is none of {', '.join(METHODS)}, repair=POLICY")
    return chosen
