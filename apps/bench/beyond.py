"""What the first token cannot see: divergence along an answer, and the next action."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvshare_mm.apps.bench.divergence import agreement
from kvshare_mm.apps.bench.rig import Rig, Served
from kvshare_mm.reuse.audits import kl_divergence

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```\w*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Action:
    """What an agent does next, as far as its answer goes.

    Attributes:
        kind: "call" of a tool, "command" in a fence, or "text".
        said: the tool's name and arguments, the command, or the text, in one spelling.
    """

    kind: str
    said: str


def action_of(answer: str) -> Action:
    """The action of an answer: its first tool call, else its first command, else all of it."""
    if call := _CALL.search(answer):
        try:
            told = json.loads(call[1])
        except ValueError:
            told = None
        if isinstance(told, dict) and "name" in told:
            said = [told["name"], told.get("arguments")]
            return Action("call", json.dumps(said, sort_keys=True))
    if fence := _FENCE.search(answer):
        return Action("command", " ".join(fence[1].split()))
    return Action("text", " ".join(answer.split()))


def beyond_first_token(rig: Rig, served: Sequence[Served], max_tokens: int) -> list[dict[str, Any]]:
    """Answers of prefilled slots beside full recompute's, each JSON-ready.

    Args:
        served: prefills of one prompt in slots of their own; the first is full recompute.
        max_tokens: longest answer.

    Returns:
        For each: ``kl_along`` and ``kl_worst``, the mean and the largest KL of the next token over
        full recompute's greedy answer, which all are made to follow (teacher forcing);
        ``greedy_agreement`` and ``answer`` of its own greedy answer; ``action`` and
        ``action_same``, the action of that answer.
    """
    forced, divergences, astray = _along(rig, served, max_tokens)
    # Who agrees everywhere on the way has the same answer of its own.
    own = [one for one, left in zip(served, astray, strict=True) if left]
    others = iter(rig.decode(own, max_tokens))
    answers = [next(others) if left else forced for left in astray]
    actions = [action_of(rig.words(answer)) for answer in answers]
    return [
        {
            "kl_along": float(np.mean(kl)),
            "kl_worst": max(kl),
            "greedy_agreement": agreement(forced, answer),
            "answer": rig.words(answer),
            "action": action.kind,
            "action_same": action == actions[0],
        }
        for kl, answer, action in zip(divergences, answers, actions, strict=True)
    ]


def _along(
    rig: Rig, served: Sequence[Served], max_tokens: int
) -> tuple[list[int], list[list[float]], list[bool]]:
    """Full recompute's greedy answer; of each KL at its tokens, and whether it would leave it."""
    answer: list[int] = []
    divergences: list[list[float]] = [[] for _ in served]
    astray = [False] * len(served)
    length = served[0].result.plan.num_tokens
    logits = [one.result.logits for one in served]
    while True:
        for i, own in enumerate(logits):
            divergences[i].append(kl_divergence(logits[0], own))
        answer.append(int(logits[0].argmax()))
        astray = [
            left or int(own.argmax()) != answer[-1]
            for left, own in zip(astray, logits, strict=True)
        ]
        full = length + len(answer) > rig.max_len
        if len(answer) == max_tokens or answer[-1] in rig.loaded.eos_token_ids or full:
            return answer, divergences, astray
        logits = rig.step(served, [answer] * len(served))
