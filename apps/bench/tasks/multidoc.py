"""Questions over several documents, scored with F1 of words, as HotpotQA and its kin are."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.apps.bench.tasks.base import Item, Task, file_of
from kvshare_mm.errors import ConfigError


@dataclass(frozen=True)
class MultiDocument(Task):
    """A question behind retrieved passages; the donor asked another one over nearly the same.

    Two questions of one subject retrieve many of the same passages in another order. The donor's
    passages are the target's with two neighbours changed and one distractor replaced.

    The data: JSON Lines of ``{"question", "answers", "docs": [{"title", "text", "support"}]}``,
    made of HotpotQA, 2WikiMultihopQA or MuSiQue.

    Args:
        documents: in every prompt; the supporting ones are always among them.
        max_words: of a passage; what is longer is cut.
    """

    name: ClassVar[str] = "multidoc"
    metric: ClassVar[str] = "F1"
    about: ClassVar[str] = "questions over several passages"
    needs_data: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 20

    documents: int = 5
    max_words: int = 90

    def items(self, path: Path | None, limit: int, seed: int) -> list[Item]:
        rows = read_jsonl(file_of(self, path), "question", "answers", "docs")
        rng = np.random.default_rng(seed)
        items = []
        for i, row in enumerate(rows[:limit]):
            if not row["docs"] or any(set(d) < {"title", "text", "support"} for d in row["docs"]):
                raise ConfigError(f"{path}: a document needs title, text and support")
            docs = sorted(row["docs"], key=lambda d: not d["support"])[: self.documents]
            other = rows[(i + 1) % len(rows)]
            order = [int(k) for k in rng.permutation(len(docs))]
            numbers = rng.integers(1000, 10_000, 2)
            target = [self._passage(docs[k]) for k in order]
            donor = list(target)
            at = int(rng.integers(max(1, len(donor) - 1)))
            donor[at : at + 2] = donor[at : at + 2][::-1]
            distractors = {self._passage(d) for d in docs if not d["support"]}
            replaced = next((k for k, text in enumerate(donor) if text in distractors), -1)
            donor[replaced] = self._passage(min(other["docs"], key=lambda d: bool(d["support"])))
            items.append(
                Item(
                    str(row.get("id", i)),
                    _prompt(int(numbers[0]), donor, str(other["question"])),
                    _prompt(int(numbers[1]), target, str(row["question"])),
                    tuple(map(str, row["answers"])),
                )
            )
        return items

    def statistics(self, answer: str, item: Item) -> list[float]:
        return [max(f1(reference, answer) for reference in item.references)]

    def _passage(self, doc: dict[str, Any]) -> str:
        return f"{doc['title']}: {' '.join(str(doc['text']).split()[: self.max_words])}"


def f1(reference: str, answer: str) -> float:
    """F1 of the words of two answers, as SQuAD's and HotpotQA's scripts compute it.

    Case, punctuation and articles do not count. Yes, no and noanswer match only themselves.
    """
    want, got = _words(reference), _words(answer)
    closed = {"yes", "no", "noanswer"}
    if want != got and (closed & {" ".join(want), " ".join(got)}):
        return 0.0
    shared = sum((Counter(want) & Counter(got)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(got), shared / len(want)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


_EXAMPLE = (
    "Question: In which city does the author of the passage on rivers live?\nAnswer: Vienna\n\n"
    "Question: Is the first film older than the second?\nAnswer: yes"
)


def _prompt(number: int, passages: list[str], question: str) -> str:
    listed = "\n\n".join(f"Passage {k}. {text}" for k, text in enumerate(passages, 1))
    return (
        f"Search {number}. Answer each question from the passages, with a name, a number, or yes "
        f"or no.\n\n{listed}\n\n{_EXAMPLE}\n\nQuestion: {question}\nAnswer:"
    )
