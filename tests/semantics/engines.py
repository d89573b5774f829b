"""What the suite asks of an engine, and how the native one does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from kvshare_mm import KVShare, RequestOptions, RequestOutput, SamplingParams
from kvshare_mm.node import Node
from kvshare_mm.reuse.scheduler import ReuseScheduler
from kvshare_mm.store.tiered import TieredStore

# Token ids, or messages.
Prompt = list[int] | list[dict[str, Any]]

NUM_LOGPROBS = 20


class Engine(Protocol):
    """An engine that serves one request after the other.

    Attributes:
        reuse, store: its donors and their KV.
        precision: how far its log probabilities may be from the native engine's.
    """

    reuse: ReuseScheduler
    store: TieredStore
    precision: float

    def ask(self, prompt: Prompt, max_tokens: int = 4, **options: Any) -> RequestOutput:
        """The answer, greedy; when it is there, the request is a donor if it ever will be."""

    def forget(self) -> None:
        """As if just started."""

    def close(self) -> None: ...


class Native:
    precision = 1e-4

    def __init__(self, model: Path | str, **options: Any) -> None:
        self.llm = KVShare(str(model), dtype="float32", embedder=None, **options)
        donors = self.llm._parts.donors
        if donors is not None:
            self.reuse, self.store = donors.reuse, donors.store

    def ask(self, prompt: Prompt, max_tokens: int = 4, **options: Any) -> RequestOutput:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=NUM_LOGPROBS)
        chunks = list(self.llm.stream(prompt, params, RequestOptions(**options)))
        self.llm.flush(60)
        output = chunks[-1].output
        assert output is not None
        return output

    def forget(self) -> None:
        self.llm.cache.clear()

    def close(self) -> None:
        self.llm.close()


def nodes(engine: Engine) -> list[Node]:
    """Its donors, the oldest first."""
    return engine.reuse.catalogue.nodes()


def told(output: RequestOutput) -> tuple[int, int, int]:
    """Exact, reused and recomputed tokens, of an account that adds up."""
    p, n = output.provenance, len(output.prompt_token_ids)
    assert p.exact + p.reused + p.recomputed == n
    assert p.similarity >= (p.exact + p.reused) / n
    assert bool(p.donors) == bool(p.exact or p.reused)
    if p.spans:  # natively they are told, too
        assert [s.start for s in p.spans] == [0, *(s.end for s in p.spans[:-1])]
        assert p.spans[-1].end == n and p.spans[-1].kind == "recomputed"
        for kind in ("exact", "reused", "recomputed"):
            assert sum(s.end - s.start for s in p.spans if s.kind == kind) == getattr(p, kind)
        assert {s.donor for s in p.spans if s.kind != "recomputed"} <= set(p.donors)
        assert all(s.donor is None for s in p.spans if s.kind == "recomputed")
    return p.exact, p.reused, p.recomputed


def reason(output: RequestOutput) -> str | None:
    """Why nothing (more) was reused."""
    return output.provenance.fallback or output.provenance.declined
