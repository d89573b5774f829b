"""Summaries of dialogues with demonstrations, by ROUGE-L: the paper's SAMSum experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.apps.bench.tasks.base import FewShot, Item


@dataclass(frozen=True)
class Summaries(FewShot):
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
    max_new_tokens: ClassVar[int] = 60

    demonstrations: int = 3
    pool: int = 30
    max_chars: int = 500

    def rows(self, path: Path) -> list[tuple[str, str]]:
        return [
            (str(r["dialogue"]).replace("\r\n", "\n").strip(), " ".join(str(r["summary"]).split()))
            for r in read_jsonl(path, "dialogue", "summary")
            if len(str(r["dialogue"])) <= self.max_chars
        ]

    def prompt(
        self, path: Path, number: int, shown: Sequence[tuple[str, str]], question: str
    ) -> str:
        parts = [f"Request {number}: sum up each dialogue in one sentence."]
        parts += [f"Dialogue:\n{d}\nSummary: {s}" for d, s in shown]
        return "\n\n".join([*parts, f"Dialogue:\n{question}\nSummary:"])

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
