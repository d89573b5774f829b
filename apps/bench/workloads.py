"""`kvshare bench workloads`: long prompts with small edits of kinds that end prefix caching."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvshare_mm.apps.bench import reuse
from kvshare_mm.apps.bench.beyond import beyond_first_token
from kvshare_mm.apps.bench.divergence import against
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.material import Material, Messages
from kvshare_mm.apps.bench.measured import Asked, measured_pairs
from kvshare_mm.apps.bench.methods import FULL, METHODS, Method, with_full
from kvshare_mm.apps.bench.rig import Rig, Served
from kvshare_mm.apps.bench.template import prompts
from kvshare_mm.errors import ConfigError

Pair = tuple[Messages, Messages]
"""A prompt that was served, and the one that follows."""

_REPORT_TOKENS = 420  # of one lab report, about
_SUMMARY = 60  # words
_SOUGHT = 24  # sessions
_GONE = "<tool_response>\n[removed to save space]\n</tool_response>"


def _clock(material: Material, i: int, rng: random.Random) -> Pair:
    session = material.airline(i)

    def at(minute: int) -> Messages:
        head = f"Request {rng.randrange(10**6, 10**7)}, 2024-05-15 15:{minute:02d}:07 EST.\n"
        return replace(session, policy=head + session.policy).messages()

    return at(rng.randrange(30)), at(30 + rng.randrange(30))


def _dropped(material: Material, i: int, rng: random.Random) -> Pair:
    session = material.airline(i, tools=0)
    return session.messages(), replace(session, turns=session.turns[2:]).messages()


def _summarised(material: Material, i: int, rng: random.Random) -> Pair:
    session = material.airline(i, tools=0)
    low, high = 2, max(4, len(session.turns) // 2 // 2 * 2)
    words = " ".join(turn["content"] for turn in session.turns[low:high]).split()[:_SUMMARY]
    said = {"role": "user", "content": f"What was said before, in short: {' '.join(words)} ..."}
    understood = {"role": "assistant", "content": "Understood."}
    turns = (*session.turns[:low], said, understood, *session.turns[high:])
    return session.messages(), replace(session, turns=turns).messages()


def _with_output(material: Material, i: int, new: Callable[[str], str]) -> Pair:
    """A session, of the two kinds in turn, and the same with the longest old output changed."""
    for k in range(i, i + _SOUGHT):
        session = material.software(k) if k % 2 else material.airline(k, tools=0)
        if session.outputs:
            at = max(session.outputs, key=lambda turn: len(session.turns[turn]["content"]))
            turns = list(session.turns)
            turns[at] = {**turns[at], "content": new(turns[at]["content"])}
            return session.messages(), replace(session, turns=tuple(turns)).messages()
    raise ConfigError("no session has an old output of a tool: give more data or longer prompts")


def _output_removed(material: Material, i: int, rng: random.Random) -> Pair:
    return _with_output(material, i, lambda _: _GONE)


def _output_changed(material: Material, i: int, rng: random.Random) -> Pair:
    """A few of its numbers are others."""

    def new(text: str) -> str:
        digits = [found.start() for found in re.finditer(r"[0-9]", text)]
        for at in rng.sample(digits, min(6, len(digits))):
            other = (int(text[at]) + rng.randrange(1, 10)) % 10
            text = f"{text[:at]}{other}{text[at + 1 :]}"
        return text if digits else f"{text} [seen]"

    return _with_output(material, i, new)


def _tools_reordered(material: Material, i: int, rng: random.Random) -> Pair:
    session = material.airline(i, policy=0.2, tools=0.4)
    tools = session.tools[len(session.tools) // 2 :] + session.tools[: len(session.tools) // 2]
    return session.messages(), replace(session, tools=tools).messages()


def _asked(passages: Sequence[str], question: str, lead: str = "Question:") -> Messages:
    text = "\n\n".join(f"Document: {passage}" for passage in passages)
    words = f"Answer the question with the documents.\n\n{text}\n\n{lead} {question}"
    return [{"role": "user", "content": words}]


def _reordered(material: Material, i: int, rng: random.Random) -> Pair:
    passages, question = material.documents(i, 8, 0.12)
    order = rng.sample(passages, len(passages))
    return _asked(passages, question), _asked(order, question)


def _replaced(material: Material, i: int, rng: random.Random) -> Pair:
    passages, question = material.documents(i, 10, 0.12)
    kept, fresh = passages[:8], passages[8:]
    for at, passage in zip(rng.sample(range(8), 2), fresh, strict=True):
        kept[at] = passage
    return _asked(passages[:8], question), _asked(kept, question)


def _added(material: Material, i: int, rng: random.Random) -> Pair:
    passages, question = material.documents(i, 8, 0.12)
    return _asked(passages[1:], question), _asked(passages, question)


def _left_out(material: Material, i: int, rng: random.Random) -> Pair:
    """The first one; what is asked about stands further behind."""
    passages, question = material.documents(i, 8, 0.12)
    return _asked(passages[::-1], question), _asked(passages[-2::-1], question)


def _rephrased(material: Material, i: int, rng: random.Random) -> Pair:
    passages, question = material.documents(i, 8, 0.12)
    return _asked(passages, question), _asked(passages, question, "What I would like to know:")


def _form(material: Material, i: int, rng: random.Random) -> Pair:
    reports = max(1, round(material.tokens / _REPORT_TOKENS))
    before, after = prompts(reports, 8, rng)
    return [{"role": "user", "content": before}], [{"role": "user", "content": after}]


def _file_edited(material: Material, i: int, rng: random.Random) -> Pair:
    lines = material.file(i)
    edited = list(lines)
    at = len(lines) // 2
    edited[at : at + 1] = [f"{lines[at]}  # checked", "    # TODO: log what was found here"]

    def asked(code: Sequence[str]) -> Messages:
        text = "\n".join(code)
        words = f"```python\n{text}\n```\nWhat does this file do? Answer in two sentences."
        return [{"role": "user", "content": words}]

    return asked(lines), asked(edited)


def _shuffled(material: Material, i: int, rng: random.Random) -> Pair:
    *examples, last = material.examples(i)

    def asked(shown: Sequence[tuple[str, str]]) -> Messages:
        text = "\n\n".join(f"{question} {right}" for question, right in shown)
        return [{"role": "user", "content": f"{text}\n\n{last[0]}"}]

    order = rng.sample(examples, len(examples))
    return asked(examples), asked(order if order != examples else examples[::-1])


KINDS: dict[str, Callable[[Material, int, random.Random], Pair]] = {
    "clock or request id at the top": _clock,
    "oldest turns dropped": _dropped,
    "turns summed up": _summarised,
    "old tool output removed": _output_removed,
    "old tool output changed": _output_changed,
    "tools in another order": _tools_reordered,
    "documents in another order": _reordered,
    "2 of 8 documents replaced": _replaced,
    "a document added in front": _added,
    "the first document dropped": _left_out,
    "question in other words": _rephrased,
    "form with 8 other numbers": _form,
    "file edited in the middle": _file_edited,
    "examples in another order": _shuffled,
}


def pairs_of(
    material: Material, number: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[dict[str, Any]]:
    """`number` pairs of each of `kinds`, as `prompts.read_pairs` gives them.

    Raises:
        ConfigError: there is no such kind, or the data are too few for prompts of this length.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"no kind {unknown[0]!r}: {', '.join(KINDS)}")
    pairs = []
    for kind in kinds:
        for i in range(number):
            try:
                donor, target = KINDS[kind](material, i, random.Random(f"{kind} {i}"))
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"{kind}: the data have another form: {error!r}") from error
            name = kind if number == 1 else f"{kind}/{i}"
            pairs.append({"id": name, "donor": donor, "target": target})
    return pairs


def run(
    rig: Rig,
    material: Material,
    methods: Sequence[Method],
    *,
    number: int,
    max_new_tokens: int,
    kinds: Sequence[str] = tuple(KINDS),
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Measure every method on pairs of every kind, beyond the first token.

    Args:
        rig: with a slot for each of `measured_methods`.
        number: pairs of each kind.
        kinds: those of `KINDS` to measure.

    Returns:
        The report as JSON-ready data: by kind and method what was computed, the first token against
        prefix caching's, and how far the answers are from full recompute's. ``actions`` counts what
        full recompute's answers are.

    Raises:
        ConfigError: see `pairs_of`.
    """
    methods = measured_methods(methods)
    rows, skipped = measured_pairs(
        rig,
        pairs_of(material, number, kinds),
        lambda asked: _measure(rig, asked, methods, max_new_tokens),
        journal,
        answer=max_new_tokens,
    )
    found: dict[str, Any] = {}
    for kind in kinds:
        mine = [row for row in rows if row["id"].partition("/")[0] == kind]
        if mine:
            found[kind] = {
                "pairs": len(mine),
                "tokens": statistics.mean(row["tokens"] for row in mine),
                "methods": {m.name: _summary(m.name, mine) for m in methods},
            }
    actions = [row["methods"][FULL.name]["action"] for row in rows]
    return {
        "kind": "workloads",
        "model": rig.loaded.name,
        "tokens": material.tokens,
        "number": number,
        "max_new_tokens": max_new_tokens,
        "skipped": skipped,
        "actions": {name: actions.count(name) for name in ("call", "command", "text")},
        "kinds": found,
        "per_pair": rows,
    }


def measured_methods(methods: Sequence[Method]) -> list[Method]:
    """The methods with the two that the others are compared with in front."""
    return with_full([METHODS["prefix"], *(m for m in methods if m is not METHODS["prefix"])])


def _measure(
    rig: Rig, asked: Asked, methods: Sequence[Method], max_new_tokens: int
) -> dict[str, Any]:
    served: dict[str, Served] = {
        method.name: rig.serve(asked.target, asked.ns, method, slot)
        for slot, method in enumerate(methods)
    }
    full = served[FULL.name]
    batch = list(served.values())
    found = (
        {"ttft_s": one.ttft, **against(full, one), **beyond}
        for one, beyond in zip(batch, beyond_first_token(rig, batch, max_new_tokens), strict=True)
    )
    return {"methods": dict(zip(served, found, strict=True))}


def _summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [row["methods"][name] for row in rows]
    ratios = [
        row["methods"]["prefix"]["ttft_s"] / part["ttft_s"]
        for row, part in zip(rows, parts, strict=True)
    ]
    return {
        **reuse.summary(name, rows),
        **_beyond(parts),
        "speedup_vs_prefix": statistics.median(ratios),
    }


def _beyond(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over pairs, and the worst of all tokens of all answers."""
    names = ("kl_along", "greedy_agreement", "action_same")
    means = {name: statistics.mean(part[name] for part in parts) for name in names}
    return {**means, "kl_worst": max(part["kl_worst"] for part in parts)}
