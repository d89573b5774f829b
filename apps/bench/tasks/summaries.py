"""Summaries of dialogues with demonstrations, by ROUGE-L: the paper's SAMSum experiment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.apps.bench.tasks.base import (
    Item,
    Task,
    examples_and_questions,
    file_of,
    similar_examples,
)


@dataclass(frozen=True)
class Summaries(Task):
    """Dialogues with other dialogues and their summaries before them.

    The data: JSON Lines of ``{"dialogue", "summary"}``, as in SAMSum and DialogSum.

    Args:
        demonstrations: in every prompt.
        pool: dialogues set aside as demonstrations: the first of the file.
        max_chars: longer dialogues are left out.
    """

    name: ClassVar[str] = "summaries"
    metric: ClassVar[str] = "ROUGE-L"
    about: ClassVar[str] = "few-shot summaries of dialogues"
    needs_data: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 60

    demonstrations: int = 3
    pool: int = 30
    max_chars: int = 500

    def items(self, path: Path | None, limit: int, seed: int) -> list[Item]:
        path = file_of(self, path)
        rows = [
            (str(r["dialogue"]).replace("\r\n", "\n").strip(), " ".join(str(r["summary"]).split()))
            for r in read_jsonl(path, "dialogue", "summary")
            if len(str(r["dialogue"])) <= self.max_chars
        ]
        rng = np.random.default_rng(seed)
        examples, questions = examples_and_questions(rows, self.pool, path)
        items = []
        for i, (dialogue, summary) in enumerate(questions[:limit]):
            target, donor = similar_examples(range(len(examples)), self.demonstrations, rng)
            numbers = rng.integers(1000, 10_000, 2)
            other = questions[(i + 1) % len(questions)][0]
            items.append(
                Item(
                    str(i),
                    _prompt(int(numbers[0]), [examples[k] for k in donor], other),
                    _prompt(int(numbers[1]), [examples[k] for k in target], dialogue),
                    (summary,),
                )
            )
        return items

    def statistics(self, answer: str, item: Item) -> list[float]:
        return [max(rouge_l(reference, answer) for reference in item.references)]


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F-measure with stemming, between 0 and 1."""
    found: float = _scorer().score(reference, answer)["rougeL"].fmeasure
    return found


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _prompt(number: int, shown: list[tuple[str, str]], dialogue: str) -> str:
    parts = [f"Request {number}: sum up each dialogue in one sentence."]
    parts += [f"Dialogue:\n{d}\nSummary: {s}" for d, s in shown]
    return "\n\n".join([*parts, f"Dialogue:\n{dialogue}\nSummary:"])
