"""`kvshare bench drafts`: answers with drafts beside answers without, and that they are the same.

Every prompt of a pair is asked of two engines, one with drafts and one without, in turns. The first
prompt of a pair has no similar request before it: its drafts come from itself (prompt lookup). The
second one's come from the first one's answer.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import track

from kvshare_mm.apps.bench.prompts import Text
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.sampling import SamplingParams

KINDS = {"donor": "nothing like it before", "target": "a similar request before"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt's answers.

    Attributes:
        same: whether they have the same tokens.
        seconds: per token behind the first, without drafts and with them.
        forwards: decode steps that the answer with drafts took.
        tokens: that they made.
    """

    same: bool
    seconds: tuple[float, float]
    forwards: int
    tokens: int


def run(model: str, pairs: Sequence[dict[str, Any]], max_new_tokens: int) -> dict[str, Any]:
    """Ask all pairs; a report of kind "drafts".

    Args:
        pairs: with ``id``, ``donor`` and ``target``, see `prompts.read_pairs`.
    """
    found: dict[str, list[_Asked]] = defaultdict(list)
    skipped: dict[str, str] = {}
    params = SamplingParams(max_tokens=max_new_tokens)
    with (
        KVShare(model, embedder=None, audit_share=0, drafts=False) as plain,
        KVShare(model, embedder=None, audit_share=0) as drafting,
    ):
        for number, pair in enumerate(track(pairs, "Asking pairs", transient=True)):
            try:
                for side in KINDS:
                    asked = _ask(plain, drafting, pair[side], params, bool(number % 2))
                    if asked is not None:
                        found[side].append(asked)
            except InvalidRequestError as error:
                skipped[str(pair["id"])] = str(error)
    return {
        "kind": "drafts",
        "model": model,
        "pairs": len(pairs),
        "max_new_tokens": max_new_tokens,
        "skipped": skipped,
        "kinds": {KINDS[side]: _summed(rows) for side, rows in found.items()},
    }


def _ask(
    plain: KVShare, drafting: KVShare, text: Text, params: SamplingParams, drafts_first: bool
) -> _Asked | None:
    """Both answers; None: they are too short to be timed."""
    outputs: dict[bool, RequestOutput] = {}
    before = _forwards(drafting)
    for drafts in (drafts_first, not drafts_first):
        llm = drafting if drafts else plain
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        outputs[drafts] = llm.chat(messages, params)
        llm.flush()  # what is saved behind an answer must not be in the next one's time
    tokens = len(outputs[True].token_ids) - 1
    if min(len(out.token_ids) for out in outputs.values()) < 3:
        return None
    seconds = [
        (out.metrics.total - out.metrics.ttft) / (len(out.token_ids) - 1)
        for out in (outputs[False], outputs[True])
    ]
    return _Asked(
        outputs[False].token_ids == outputs[True].token_ids,
        (seconds[0], seconds[1]),
        _forwards(drafting) - before,
        tokens,
    )


def _forwards(llm: KVShare) -> int:
    return int(llm.stats()["requests"].get("answer_forwards", 0))


def _summed(rows: Sequence[_Asked]) -> dict[str, Any]:
    ratios = [without / with_drafts for without, with_drafts in (row.seconds for row in rows)]
    plain, drafting = (statistics.mean(row.seconds[i] for row in rows) for i in (0, 1))
    return {
        "answers": len(rows),
        "same": sum(row.same for row in rows),
        "token_s": {"plain": plain, "drafts": drafting},
        "times_sooner": plain / drafting,
        "times_sooner_median": statistics.median(ratios),
        "times_sooner_worst": min(ratios),
        "tokens_a_forward": sum(r.tokens for r in rows) / max(1, sum(r.forwards for r in rows)),
    }
