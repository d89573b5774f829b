"""`kvshare bench coverage`: is the promised bound kept, from a cold start and as traffic shifts?

A stream of similar requests is served several times, each from an empty store: with the bound's
constants as they are, and with audits of a share of the requests that move it. Every request is
computed in full beside that, so that its divergence is known; what learns sees its audits alone.

- covered: of the requests that reuse approximately, those whose first token's KL from full
  recompute is at most their `max_divergence`;
- as expected: those whose KL is at most what they were told to expect of themselves, which is
  nearer (`provenance.expected_divergence`): 95% is right, more is too strict and less too loose;
- leaks: answers with the value that a donor has in the place of the one that was asked for, where
  full recompute states the right one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from rich.progress import track

from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.methods import FULL, METHODS
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig, Served
from kvshare_mm.apps.bench.shifts import Asked
from kvshare_mm.apps.bench.tasks.facts import states
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.native.audit import Audit, Auditor
from kvshare_mm.request import RequestSpec
from kvshare_mm.reuse.audits import kl_divergence
from kvshare_mm.reuse.calibration import ROUNDING, Calibration
from kvshare_mm.reuse.repair import asked_divergence
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import SegmentStream

Row = dict[str, Any]

# Audits of a part of the stream from where on it counts as learned.
LEARNED = 30
_MAX_TOKENS = 16


class _Truth:
    """A request, and what full recompute says to it; computed when it is first asked for."""

    def __init__(self, rig: Rig, asked: Asked) -> None:
        self.asked = asked
        self._rig = rig

    @cached_property
    def stream(self) -> SegmentStream:
        """Raises InvalidRequestError: it does not fit into a slot."""
        stream = encode(self._rig, self.asked.prompt, self.asked.chat)
        self._rig.check(stream, answer=_MAX_TOKENS)
        return stream

    @property
    def fits(self) -> bool:
        try:
            return len(self.stream) > 0
        except InvalidRequestError:
            return False

    @cached_property
    def _full(self) -> tuple[torch.Tensor, str]:
        served = self._rig.serve(self.stream, self._rig.namespace("full"), FULL, store=False)
        return served.result.logits, _answer(self._rig, served, self.asked)

    @property
    def logits(self) -> torch.Tensor:
        """``[vocab_size]`` of the first token."""
        return self._full[0]

    @property
    def answer(self) -> str:
        return self._full[1]


def _answer(rig: Rig, served: Served, asked: Asked) -> str:
    """The answer in words, where there is a right one."""
    if asked.about is None:
        return ""
    [tokens] = rig.decode([served], _MAX_TOKENS, lambda said: "\n" in rig.words(said).lstrip())
    return rig.words(tokens).lstrip().partition("\n")[0]


def run(
    rig: Rig, stream: Sequence[Asked], shares: Sequence[float], *, journal: Journal | None = None
) -> Row:
    """Serve the stream with the fixed bound, and once for each share of audits.

    Args:
        rig: with two slots.
        shares: of the requests that reuse approximately, each in (0, 1].
        journal: keeps each time that the stream was served.

    Returns:
        The report as JSON-ready data: ``passes`` by name ("fixed", or the share), each with the
        figures of the whole stream and of its parts; a row for each request, and how many were left
        out because they are ``too_long``.
    """
    journal = journal or Journal(None, None)
    truths = [truth for truth in (_Truth(rig, asked) for asked in stream) if truth.fits]
    rows: dict[str, list[Row]] = {}
    for share in (0.0, *shares):
        name = f"{share:g}" if share else "fixed"
        rows[name] = journal.get(name) or _served(rig, truths, share)
        journal.put(name, rows[name])
    phases = list(dict.fromkeys(asked.phase for asked in stream))
    return {
        "kind": "coverage",
        "model": rig.loaded.name,
        "max_divergence": asked_divergence(rig.config.policy),
        "requests": len(truths),
        "too_long": len(stream) - len(truths),
        "passes": {
            name: {
                "all": summary(found),
                **{phase: summary([r for r in found if r["phase"] == phase]) for phase in phases},
            }
            for name, found in rows.items()
        },
        "per_request": rows,
    }


def summary(rows: Sequence[Row]) -> Row:
    """Figures of some requests that were served in this order."""
    served = [row for row in rows if row["kl"] is not None]
    audits = [i for i, row in enumerate(rows) if row["audited"]]
    learned = rows[audits[LEARNED - 1] + 1 :] if len(audits) >= LEARNED else []
    return {
        "requests": len(rows),
        "approximate": len(served),
        "audits": len(audits),
        "covered": _share([row["kl"] <= row["asked"] for row in served]),
        "as_expected": _share([row["kl"] <= max(row["expected"], ROUNDING) for row in served]),
        "kl": spread([row["kl"] for row in served], 95),
        "computed_share": _computed(rows),
        "computed_share_learned": _computed(learned),
        "shut": sum(row["declined"] == "audited" for row in rows),
        "asked_for_values": sum(row["right"] for row in served),
        "leaks": sum(row["leak"] for row in rows),
    }


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def _computed(rows: Sequence[Row]) -> float | None:
    tokens = sum(row["tokens"] for row in rows)
    return sum(row["computed_tokens"] for row in rows) / tokens if tokens else None


def _served(rig: Rig, truths: Sequence[_Truth], share: float) -> list[Row]:
    """The stream from an empty store, nothing learned; a share of 0: nothing ever will be."""
    ns, reuse = rig.namespace(f"coverage-{share:g}"), rig.donors.reuse
    learner = Calibration(Counter())
    auditor = Auditor(
        rig.runner, learner, share, math.inf, rig.loaded.tokenizer, rig.encoder, seed=0
    )
    if share:
        reuse.calibration, reuse.default = learner, rig.config.policy
    known: dict[str, Asked] = {}
    try:
        name = f"Audits of {share:g}" if share else "The fixed bound"
        return [
            _serve(rig, truth, ns, auditor if share else None, known)
            for truth in track(truths, name, transient=True)
        ]
    finally:
        reuse.calibration = None
        for node_id in known:
            rig.donors.delete(node_id)


def _serve(
    rig: Rig, truth: _Truth, ns: str, auditor: Auditor | None, known: dict[str, Asked]
) -> Row:
    asked = truth.asked
    right = bool(asked.about) and states(truth.answer, asked.values[str(asked.about)])
    kl, full = None, truth.logits
    served = rig.serve(truth.stream, ns, METHODS["kvshare"])
    plan, logits = served.result.plan, served.result.logits
    promise = plan.promise
    others = [known[donor] for donor in plan.donors if donor in known]
    node_id = rig.save(truth.stream, ns, served)
    if node_id is not None:
        known[node_id] = asked
    leak = False
    if promise is not None:
        kl = kl_divergence(full, logits)
        leak = right and _leaks(_answer(rig, served, asked), asked, others)
    audit = None
    if auditor is not None:
        spec = RequestSpec(truth.stream, "", SamplingParams(max_tokens=1), ns)
        audit = auditor.draw(spec, plan, [int(logits.argmax())])
    if auditor is not None and audit is not None:
        audit.keep(logits)
        audit.node_id = node_id
        _audited(rig, auditor, audit)
    return {
        "phase": asked.phase,
        "tokens": len(truth.stream),
        **served.cost,
        "kl": kl,
        "asked": promise and promise.asked,
        "bound": promise and promise.bound,
        "expected": promise and promise.expected,
        "family": promise and promise.family,
        "audited": audit is not None,
        "right": right,
        "leak": leak,
    }


def _leaks(answer: str, asked: Asked, donors: Sequence[Asked]) -> bool:
    """Whether an answer states what a donor has in the place of what was asked for."""
    about = str(asked.about)
    olds = {donor.values.get(about) for donor in donors} - {None, asked.values[about]}
    return any(states(answer, str(old)) for old in olds)


def _audited(rig: Rig, auditor: Auditor, audit: Audit) -> None:
    """Audit a request at once, in the slot beside its own."""
    auditor.add(audit)
    while len(auditor):
        over = auditor.work(1, lambda: False)
        if over is not None:
            auditor.remove(over)
            auditor.heal(over, rig.donors)
