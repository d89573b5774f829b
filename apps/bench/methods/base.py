"""What a method is: a way to serve a request when a similar one was served before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvshare_mm.engine.prefill import Sharing
from kvshare_mm.repair import RepairPolicy, make_policy


@dataclass(frozen=True, slots=True)
class Method:
    """Serves a request with what may be reused of stored KV.

    Attributes:
        name: what it is called on the command line and in reports.
        about: one line, with its source.
        sharing: what may be reused.
        repair: which kept positions are recomputed, as `kvshare_mm.repair.make_policy` takes it;
            None is the project's default.
        budgets: the same for a few budgets from cheap to dear: its points on the frontier.
            Empty: the method has one point.
    """

    name: str
    about: str
    sharing: Sharing
    repair: str | None = None
    budgets: tuple[str, ...] = ()

    @property
    def policy(self) -> RepairPolicy | None:
        return make_policy(self.repair) if self.repair else None

    def at_budgets(self) -> tuple[Method, ...]:
        """The method at each of its budgets, named ``method@policy``."""
        if not self.budgets:
            return (self,)
        return tuple(
            Method(f"{self.name}@{spec}", self.about, self.sharing, spec) for spec in self.budgets
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
