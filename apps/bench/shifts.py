"""Streams of similar requests whose kind changes on the way: chat, then forms, then exams."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvshare_mm import assets
from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.apps.bench.prompts import Text, read_pairs
from kvshare_mm.apps.bench.tasks.exams import QUESTIONS, STUDENTS, exam_text
from kvshare_mm.apps.bench.tasks.reports import (
    ANALYTES,
    PATIENTS,
    distinct_values,
    report_text,
)
from kvshare_mm.apps.desk.shop import Letter
from kvshare_mm.assets.shop.phrases import BOTH_TOPICS, PICTURE_TOPICS, TOPICS
from kvshare_mm.assets.shop.similar import similar_pairs

PHASES = ("chat", "forms", "exams")
PICTURE_PHASES = {
    "other words": ("rephrased", "other_filler"),
    "other facts": ("other_facts",),
    "other picture": ("other_picture",),
}
# Tokens of a prompt that is read from a file.
_SHORTEST, _LONGEST = 40, 500
# Forms and exams of a kind differ in what is filled in, as those of one sender do.
_TEMPLATES = 3
_NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of a stream.

    Attributes:
        phase: the part of the stream that it belongs to.
        prompt: a text, or the messages of a chat.
        chat: whether a text becomes a user message.
        values: what the prompt says of what may be asked, by a name of that.
        about: which of them it asks for; None: none.
    """

    phase: str
    prompt: Text
    chat: bool = False
    values: Mapping[str, str] = field(default_factory=dict)
    about: str | None = None


def text_stream(
    length: int, folder: Path | None, count: Callable[[str], int], seed: int = 0
) -> list[Asked]:
    """`length` requests, a third of each of `PHASES`.

    Chat is customers' letters with questions of Banking77 and, where `folder` has ``pairs.jsonl``,
    its pairs of similar prompts in turn; the same of exams, which are made up or of its pairs.
    Forms are laboratory reports of three senders.

    Args:
        folder: with ``pairs.jsonl`` and ``banking77.jsonl``; None: what is installed.
        count: tokens of a text.

    Raises:
        ConfigError: a file is missing or is not what it should be.
    """
    pairs = read_pairs(folder / "pairs.jsonl") if folder else []
    installed = assets.folder("workloads").parent / "banking77-sample.jsonl"
    banking = folder / "banking77.jsonl" if folder else installed
    questions = [str(row["text"]) for row in read_jsonl(banking, "text")]
    sides = [
        (str(pair.get("source", "")), side)
        for pair in pairs
        if all(_fits(pair[side], count) for side in ("donor", "target"))
        for side in (pair["donor"], pair["target"])
    ]
    exams = [text for source, text in sides if source.startswith("exam")]
    chats = [text for source, text in sides if not source.startswith("exam")]
    made = {
        "chat": _in_turn(_letters(random.Random(f"{seed}/chat"), questions), "chat", chats),
        "forms": _forms(random.Random(f"{seed}/forms")),
        "exams": _in_turn(_exams(random.Random(f"{seed}/exams")), "exams", exams),
    }
    return _joined(made, length)


def picture_stream(length: int, seed: int = 0) -> list[Asked]:
    """`length` requests about pictures, a third of each of `PICTURE_PHASES`: what a request has
    unlike the one before is its words, then its facts, then its picture."""
    made = {phase: _pictures(phase, ways, seed) for phase, ways in PICTURE_PHASES.items()}
    return _joined(made, length)


def _joined(made: Mapping[str, Iterator[Asked]], length: int) -> list[Asked]:
    ends = [length * k // len(made) for k in range(len(made) + 1)]
    parts = zip(made.values(), itertools.pairwise(ends), strict=True)
    return [one for requests, (a, b) in parts for one in itertools.islice(requests, b - a)]


def _fits(text: Text, count: Callable[[str], int]) -> bool:
    return isinstance(text, str) and _SHORTEST <= count(text) <= _LONGEST


def _in_turn(made: Iterator[Asked], phase: str, texts: Sequence[str]) -> Iterator[Asked]:
    """Two that are made and two that were read, in turn, until those are used up."""
    for at in range(0, len(texts), 2):
        yield from itertools.islice(made, 2)
        yield from (Asked(phase, text, chat=True) for text in texts[at : at + 2])
    yield from made


def _letters(rng: random.Random, questions: Sequence[str]) -> Iterator[Asked]:
    while True:
        name, order = rng.choice(_NAMES), str(rng.randrange(1_000, 100_000))
        yield Asked("chat", Letter(name, order, rng.choice(questions)).messages())


def _forms(rng: random.Random) -> Iterator[Asked]:
    panels = [rng.sample(ANALYTES, 8) for _ in range(_TEMPLATES)]
    while True:
        style = rng.randrange(_TEMPLATES)
        panel, patient = panels[style], rng.choice(PATIENTS)
        values, asked = distinct_values(panel, {}, rng), rng.choice(panel)
        text = report_text(style, rng.randrange(10_000, 100_000), patient, panel, values, asked)
        yield Asked("forms", text, values=values, about=asked.name)


def _exams(rng: random.Random) -> Iterator[Asked]:
    papers = [rng.sample(QUESTIONS, 8) for _ in range(_TEMPLATES)]
    while True:
        paper, student = rng.choice(papers), rng.choice(STUDENTS)
        texts, answers = [text for text, _ in paper], [rng.choice(said) for _, said in paper]
        asked = rng.randrange(len(paper))
        yield Asked(
            "exams",
            exam_text(student, texts, answers, asked),
            values=dict(zip(texts, answers, strict=True)),
            about=texts[asked],
        )


def _pictures(phase: str, ways: Sequence[str], seed: int) -> Iterator[Asked]:
    topics = PICTURE_TOPICS + BOTH_TOPICS if phase == "other picture" else TOPICS
    for _, *pair in similar_pairs(seed, ways, topics):
        for request in pair:
            topic = request.question.topic
            yield Asked(phase, request.messages(), True, {topic: request.answer()}, topic)
