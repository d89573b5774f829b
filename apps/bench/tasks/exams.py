"""Graded exams of other students: does the answer follow this student's words?"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from kvshare_mm.apps.bench.tasks.base import Item
from kvshare_mm.apps.bench.tasks.facts import FactTask

# A question and answers that students give; the first is right. No answer occurs twice.
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is the capital of France?", ("Paris", "Lyon", "Marseille", "Nice")),
    ("Which river flows through Cairo?", ("Nile", "Congo", "Niger", "Zambezi")),
    ("Which is the largest ocean?", ("Pacific", "Atlantic", "Arctic", "Southern")),
    ("Which is the highest mountain?", ("Everest", "Kilimanjaro", "Denali", "Elbrus")),
    ("What is the capital of Australia?", ("Canberra", "Sydney", "Melbourne", "Perth")),
    ("Which is the largest hot desert?", ("Sahara", "Gobi", "Kalahari", "Mojave")),
    ("What is the capital of Japan?", ("Tokyo", "Kyoto", "Osaka", "Nagoya")),
    ("Which country is the largest in South America?", ("Brazil", "Argentina", "Peru", "Chile")),
    ("Which river flows through Vienna?", ("Danube", "Rhine", "Elbe", "Vistula")),
    ("Which island country has Reykjavik?", ("Iceland", "Ireland", "Malta", "Cyprus")),
    ("Which planet is nearest to the sun?", ("Mercury", "Venus", "Mars", "Neptune")),
    ("Which metal is liquid at room temperature?", ("Quicksilver", "Lead", "Tin", "Zinc")),
    ("Who painted the Mona Lisa?", ("Leonardo", "Raphael", "Titian", "Rembrandt")),
    ("Which gas do plants take in?", ("Carbon dioxide", "Nitrogen", "Helium", "Methane")),
)
STUDENTS = ("Adams", "Baker", "Castro", "Dubois", "Evans", "Fischer", "Garcia", "Huang", "Ivanov",
             "Jensen", "Kowalski", "Lopez")  # fmt: skip


@dataclass(frozen=True)
class Exams(FactTask):
    """Exams made by seed, asked for an answer that is not the donor's student's.

    Args:
        questions: of an exam.
        changed: answers that differ from the donor's; the question is for one of them.
    """

    name: ClassVar[str] = "exams"
    about: ClassVar[str] = "graded exams: the answer asked for is not the donor's"
    max_new_tokens: ClassVar[int] = 12

    questions: int = 8
    changed: int = 3

    def item(self, i: int, rng: random.Random) -> Item:
        asked_of = rng.sample(QUESTIONS, self.questions)
        before = [rng.choice(answers) for _, answers in asked_of]
        after = list(before)
        changed = rng.sample(range(self.questions), self.changed)
        for k in changed:
            after[k] = rng.choice([a for a in asked_of[k][1] if a != before[k]])
        asked, other = rng.choice(changed), rng.choice(changed)
        students = rng.sample(STUDENTS, 2)
        texts = [text for text, _ in asked_of]
        return Item(
            str(i),
            exam_text(students[0], texts, before, other),
            exam_text(students[1], texts, after, asked),
            (after[asked],),
            before[asked],
        )


def exam_text(student: str, questions: list[str], answers: list[str], asked: int) -> str:
    rows = "\n".join(
        f"Question {k}: {question} The student wrote: {answer}."
        for k, (question, answer) in enumerate(zip(questions, answers, strict=True), 1)
    )
    return (
        f"General knowledge exam of the student {student}. One point for every right answer.\n"
        f"{rows}\nThe exam was graded by two teachers.\n\n"
        # As a row of the exam: small models copy better than they answer questions about it.
        f"The answer of the student {student} to question {asked + 1} is repeated here.\n"
        f"Question {asked + 1}: {questions[asked]} The student wrote:"
    )
