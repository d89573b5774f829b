"""The methods that are compared, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvshare_mm.apps.bench import gptcache
from kvshare_mm.apps.bench.policies import AtHand, bench_policies
from kvshare_mm.config import Reuse
from kvshare_mm.errors import ConfigError
from kvshare_mm.reuse.repair import RepairPolicy, make_policy

_POLICY = "repair="


def _unknown(*_: Any) -> Any:
    raise ConfigError("this repair policy looks at a request, and there is none")


_NOBODY = AtHand(_unknown, _unknown, _unknown)


@dataclass(frozen=True, slots=True)
class Method:
    """Serves a request with what may be reused of stored KV.

    Attributes:
        name: what it is called on the command line and in reports.
        about: one line, with its source.
        reuse: what may be reused.
        repair: which kept positions are recomputed, as `make_policy` takes it; None
            is the project's default.
        budgets: the same for a few budgets from cheap to dear: its points on the frontier.
            Empty: the method has one point.
        dtype: what the model computes in; None: as the others do.
        packed: donors' KV is kept in eight bits.
    """

    name: str
    about: str
    reuse: Reuse
    repair: str | None = None
    budgets: tuple[str, ...] = ()
    dtype: str | None = None
    packed: bool = False

    def policy(self, request: AtHand = _NOBODY) -> RepairPolicy | None:
        """How it repairs; None: as the project does. Raises ValueError: there is no such policy.

        Args:
            request: that is served.
        """
        if self.repair is None:
            return None
        return make_policy(self.repair, bench_policies(request))

    def at_budgets(self) -> tuple[Method, ...]:
        """The method at each of its budgets, named ``method@policy``."""
        if not self.budgets:
            return (self,)
        return tuple(
            Method(f"{self.name}@{spec}", self.about, self.reuse, spec) for spec in self.budgets
        )


class AnswerStore(Protocol):
    """Stored answers, found by their questions."""

    def put(self, question: str, answer: str) -> None:
        """Store an answer."""

    def get(self, question: str) -> str | None:
        """The answer of a stored question that counts as the same, or None."""

    def close(self) -> None:
        """Release what the store holds."""


@dataclass(frozen=True, slots=True)
class AnswerMethod:
    """Serves a request with a stored answer, if a stored question is near enough.

    Attributes:
        name: what it is called on the command line and in reports.
        about: one line, with its source.
        opener: prepares what is costly (an embedder) and returns what opens an empty store.
    """

    name: str
    about: str
    opener: Callable[[], Callable[[], AnswerStore]]


AnyMethod = Method | AnswerMethod

FULL = Method("full", "full recompute: the measure of all others", "off")
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_METHODS = (
    FULL,
    # How much answers change for a reason that nobody minds: a yardstick for the others.
    Method("bfloat16", "full recompute in bfloat16: rounding alone", "off", dtype="bfloat16"),
    Method("prefix", "prefix caching, as in vLLM and SGLang: the identical beginning", "exact"),
    Method("placeholders", "KVShare v1 (arXiv 2503.16525): nothing repaired", "similar", "none"),
    Method(
        "cacheblend",
        "CacheBlend (arXiv 2405.16444): the positions whose V deviates most, fewer in every layer",
        "similar",
        "narrowing:0.15",
        tuple(f"narrowing:{share}" for share in _SHARES),
    ),
    Method(
        "epic",
        "EPIC (arXiv 2410.15332): the first positions of every kept run",
        "similar",
        "window:16",
        tuple(f"window:{width}" for width in (2, 4, 8, 16, 32, 64)),
    ),
    Method(
        "window32",
        "a contiguous window of 32 behind every edit (arXiv 2609.17983)",
        "similar",
        "window:32",
    ),
    Method(
        "boundary",
        "from every edit to the end of the line or sentence, 64 at most (arXiv 2609.17983)",
        "similar",
        "boundary:64",
        tuple(f"boundary:{most}" for most in (16, 32, 64)),
    ),
    # The paper's question is computed in any case, and nothing else of the prompt is new.
    Method(
        "prophetkv",
        "ProphetKV (arXiv 2602.02579): the last 32 positions and the 20% they look at most",
        "similar",
        "prophet:0.2",
        tuple(f"prophet:{share}" for share in (0.05, 0.1, 0.2, 0.3, 0.5)),
    ),
    Method(
        "llamacpp",
        "llama.cpp --cache-reuse 256 (#9866): long chunks that moved to the front, unrepaired",
        "similar",
        "earlier:256",
        ("earlier:256", "earlier:64"),
    ),
    # Between the two: the window catches what looks back on an edit for the price of no
    # measurement, the deviation finds the rest.
    Method(
        "deviation",
        "a window of 4 behind every edit, then the positions that drifted most",
        "similar",
        "window:4+deviation:0.15",
        tuple(f"window:4+deviation:{share}" for share in _SHARES),
    ),
    Method(
        "kvshare",
        "this project's default policy",
        "similar",
        None,
        tuple(f"auto:{divergence}" for divergence in (0.1, 0.03, 0.01, 0.003, 0.001)),
    ),
    Method("q8", "the same with donors' KV in eight bits (Q8_0)", "similar", packed=True),
)
METHODS: dict[str, Method] = {m.name: m for m in _METHODS}
ANSWER_METHODS: dict[str, AnswerMethod] = {
    "gptcache": AnswerMethod(
        "gptcache", "GPTCache 0.1.44: the answer of a similar question", gptcache.opener
    )
}


def with_full(methods: Sequence[Method]) -> list[Method]:
    """The methods with full recompute first: the others are compared with it."""
    return [FULL, *(m for m in methods if m is not FULL)]


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
    return [_method(name) for name in dict.fromkeys(n.strip() for n in names.split(","))]


def _method(name: str) -> AnyMethod:
    if name.startswith(_POLICY):
        spec = name.removeprefix(_POLICY)
        method = Method(name, f"repair policy {spec}", "similar", spec)
        try:
            method.policy()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return method
    known: dict[str, AnyMethod] = {**METHODS, **ANSWER_METHODS}
    if name not in known:
        raise ConfigError(f"method {name!r} is none of {', '.join(known)}, repair=POLICY")
    return known[name]
