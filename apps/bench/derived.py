"""`kvshare bench derived`: facts that follow from an edited value, and stand somewhere behind it.

After "Contiguity, Not Importance" (arXiv 2609.17983): what depends on an edit was noted by the
model in the KV of the text behind it, and that text is the same in donor and target. So an edited
value alone changes little, and the answer to a question about what follows from it stays the old
one.

Every case is a record with one edited value, a sentence on what follows from it right behind it or
some hundred tokens later, and a question about that. The margin of an answer is log p(new answer) -
log p(old answer) at the token where the two part. With `stale`, the margin where only what differs
in the text is computed:

- margin recovery = (margin - margin_stale) / (margin_full - margin_stale), of sums over cases;
- flip rate: of the cases that `stale` answers with the old value, how many get the new one;
- stale answers: of all cases, how many are answered with the old value.

Only cases count that the model can do: full recompute of the donor's prompt prefers the old answer,
of the target's the new one. A declined request is recomputed in full, and is counted as declined
and not as recovered.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.material import Material
from kvshare_mm.apps.bench.measured import measured
from kvshare_mm.apps.bench.methods import FULL, METHODS, Method
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig, Served
from kvshare_mm.errors import InvalidRequestError

Row = dict[str, Any]

STALE = METHODS["placeholders"]
# Tokens of other text between the edited value and what follows from it.
DISTANCES = (0, 250, 1500)
_NAMES = ("Anna Berg", "Boris Lang", "Clara Weiss", "David Roth", "Elena Kraus", "Felix Stern")
_STATES = ("open", "closed", "late", "paid", "lost", "shipped")


@dataclass(frozen=True, slots=True)
class Case:
    """One edit and a question about what follows from it.

    Attributes:
        id: of the case.
        fact: "status", "sum" or "age".
        distance: tokens between the edited value and the dependent sentence, about.
        donor, target: the prompts, without a chat template: they end where the answer goes on.
        old, new: answers to the two.
    """

    id: str
    fact: str
    distance: int
    donor: str
    target: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A record's parts; ``{}`` in `record` is the edited value."""

    record: str
    dependent: str
    question: str
    values: tuple[str, str]
    answers: tuple[str, str]


def _status(rng: random.Random) -> Fact:
    name, number = rng.choice(_NAMES), rng.randrange(1000, 10_000)
    old, new = rng.sample(_STATES, 2)
    return Fact(
        f"Ticket {number} of {name}. Status: {{}}.\n",
        f"On the phone, {name} was told the status of ticket {number}.\n",
        f"Question: Which status of ticket {number} was {name} told on the phone?\n"
        "Answer: The status is",
        (old, new),
        (f" {old}", f" {new}"),
    )


def _sum(rng: random.Random) -> Fact:
    number, first = rng.randrange(1000, 10_000), rng.choice((10, 20, 30))
    old, new = rng.sample(range(10, 60, 10), 2)
    return Fact(
        "Slip 1: 20 and 10, together 30. Slip 2: 40 and 20, together 60. Slip 3: 30 and 10, "
        f"together 40. Slip 4: 10 and 40, together 50.\nSlip {number}: {first} and {{}}.\n",
        f"The two amounts of slip {number} were added up, and the sum was booked.\n",
        f"Question: How much are the two amounts of slip {number} together?\nAnswer: Together ",
        (str(old), str(new)),
        (str(first + old), str(first + new)),
    )


def _age(rng: random.Random) -> Fact:
    name = rng.choice(_NAMES)
    old, new = rng.sample(range(1950, 2010, 10), 2)
    born = ", ".join(f"in {year} is {2030 - year}" for year in range(1950, 2010, 10))
    return Fact(
        f"Ages in the year 2030: who was born {born}.\n{name} was born in {{}}.\n",
        f"How old {name} is in the year 2030 was written on the form.\n",
        f"Question: How old is {name} in the year 2030?\nAnswer: {name} is ",
        (str(old), str(new)),
        (str(2030 - old), str(2030 - new)),
    )


FACTS: dict[str, Callable[[random.Random], Fact]] = {"status": _status, "sum": _sum, "age": _age}
# So much stands between the dependent sentence and the question that repairing the prompt's end
# does not reach it.
_CLOSING = (
    "The file was closed after that and kept with the others of the same month. Two people have "
    "read it. It is not to be copied, and whoever takes it out signs for it at the desk.\n"
)


def derived_cases(material: Material, per_fact: int, seed: int = 0) -> list[Case]:
    """Cases of every fact at every distance; `material` fills the space between.

    Raises:
        ConfigError: the data are too few for the largest distance.
    """
    cases = []
    for fact, make in FACTS.items():
        for i in range(per_fact):
            made = make(random.Random(f"{seed}/{fact}/{i}"))
            for distance in DISTANCES:
                between = material.filler(i, distance)
                rest = f"{between}{made.dependent}{_CLOSING}{made.question}"
                donor, target = (made.record.format(value) + rest for value in made.values)
                name = f"{fact}-{distance}-{i}"
                cases.append(Case(name, fact, distance, donor, target, *made.answers))
    return cases


def run(
    rig: Rig,
    cases: Sequence[Case],
    methods: Sequence[Method],
    *,
    journal: Journal | None = None,
) -> Row:
    """Measure every method on every case.

    Args:
        rig: one slot is enough; nothing is decoded.
        methods: full recompute and `STALE` are measured too.

    Returns:
        The report as JSON-ready data: ``distances`` by distance, with the cases that the model can
        do and ``methods``: ``margin_recovery``, ``flip_rate``, ``stale_answers``, ``declined``, and
        ``extra_tokens``, those computed beyond what differs (mean over what was not declined).

    Raises:
        ConfigError: no case could be served.
    """
    methods = [m for m in methods if m not in (FULL, STALE)]
    rows, skipped = measured(
        cases,
        lambda case: _measure(rig, case, methods),
        journal,
        key=asdict,
        name=lambda case: case.id,
        noun="case",
    )
    distances = {}
    for distance in dict.fromkeys(case.distance for case in cases):
        those = [(case, row) for case, row in rows if case.distance == distance]
        able = [(case, row) for case, row in those if row["donor"] < 0 < row["full"]]
        distances[str(distance)] = {
            "cases": len(those),
            "able": {fact: sum(case.fact == fact for case, _ in able) for fact in FACTS},
            "stale_old": sum(row["stale"] < 0 for _, row in able),
            "methods": {m.name: summary(m.name, [row for _, row in able]) for m in methods},
        }
    return {
        "kind": "derived",
        "model": rig.loaded.name,
        "cases": len(rows),
        "able": sum(sum(found["able"].values()) for found in distances.values()),
        "skipped": skipped,
        "distances": distances,
        "per_case": [{"id": case.id, "fact": case.fact, **row} for case, row in rows],
    }


def summary(name: str, rows: Sequence[Row]) -> Row:
    """What a method makes of cases that the model can do; see the module for the measures."""
    served = [(row, row["methods"][name]) for row in rows]
    served = [(row, found) for row, found in served if not found["declined"]]
    gap = sum(row["full"] - row["stale"] for row, _ in served)
    won = sum(found["margin"] - row["stale"] for row, found in served)
    astray = [found["margin"] > 0 for row, found in served if row["stale"] < 0]
    return {
        "margin_recovery": won / gap if gap > 0 else None,
        "flip_rate": statistics.mean(astray) if astray else None,
        "stale_answers": sum(found["margin"] < 0 for _, found in served),
        "declined": len(rows) - len(served),
        "extra_tokens": statistics.mean(f["extra_tokens"] for _, f in served) if served else None,
    }


def _measure(rig: Rig, case: Case, methods: Sequence[Method]) -> Row:
    donor, target = (encode(rig, text, chat=False) for text in (case.donor, case.target))
    rig.check(donor, target)
    old, new = _parting(rig, case)
    ns = rig.namespace(f"derived-{case.id}")

    def margin(served: Served) -> float:
        return float(served.result.logits[new] - served.result.logits[old])

    with rig.known(donor, ns) as first:
        row: Row = {"tokens": len(target), "donor": margin(first)}
        row["full"] = margin(rig.serve(target, ns, FULL))
        stale = rig.serve(target, ns, STALE)
        row["stale"] = margin(stale)
        row["methods"] = {}
        for method in methods:
            served = rig.serve(target, ns, method)
            row["methods"][method.name] = {
                "margin": margin(served),
                "extra_tokens": served.result.plan.num_computed - stale.result.plan.num_computed,
                "declined": served.result.plan.declined,
            }
    return row


def _parting(rig: Rig, case: Case) -> tuple[int, int]:
    """The tokens where the old and the new answer part, right behind the target's prompt."""
    ids = [
        rig.loaded.tokenizer(text)["input_ids"]
        for text in (case.target, case.target + case.old, case.target + case.new)
    ]
    at = len(ids[0])
    old, new = (found[at] for found in ids[1:])
    if old == new or any(found[:at] != ids[0] for found in ids[1:]):
        raise InvalidRequestError("the answers do not part at their first token", "target")
    return old, new
