"""What a task is: pairs of similar requests, and a score of the answers to the second."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a task.

    Attributes:
        id: unique within the task.
        donor: the earlier request, whose KV is stored.
        target: the request that is answered and scored.
        references: right answers; the best match counts.
        stale: the donor's fact where the target has another: an answer that states it leaks.
    """

    id: str
    donor: str
    target: str
    references: tuple[str, ...]
    stale: str | None = None

    def __post_init__(self) -> None:
        if not self.donor or not self.target or not self.references:
            raise ValueError(f"item {self.id} lacks a donor, a target or a reference")


class Task(ABC):
    """A kind of question with its metric.

    Subclasses are frozen dataclasses whose fields are their parameters.

    Attributes:
        name: on the command line and in reports.
        metric: the metric's usual name.
        about: one line.
        needs_data: whether `items` reads a file.
        chat: whether a prompt is a user message for the model's chat template, or goes to the
            model as it is.
        max_new_tokens: longest answer.
        stop: strings that end an answer.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    about: ClassVar[str]
    needs_data: ClassVar[bool]
    chat: ClassVar[bool] = False
    max_new_tokens: ClassVar[int]
    stop: ClassVar[tuple[str, ...]] = ("\n",)

    @abstractmethod
    def items(self, path: Path | None, limit: int, seed: int) -> list[Item]:
        """The first `limit` questions.

        Args:
            path: the data file, for tasks that need one.
            limit: at most so many.
            seed: of everything that is drawn.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """

    @abstractmethod
    def statistics(self, answer: str, item: Item) -> list[float]:
        """Numbers of one answer whose sums over all answers give the score."""

    def score(self, totals: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        """Scores from summed statistics.

        Args:
            totals: ``[..., num_statistics]``.
            count: how many answers were summed.

        Returns:
            ``[...]`` scores between 0 and 100. Here: the mean of the only statistic, in percent.
        """
        mean: NDArray[np.float64] = 100 * totals[..., 0] / count
        return mean

    def clean(self, text: str) -> str:
        """The answer in what the model wrote: cut at the first stop string."""
        text = text.lstrip()
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text.strip()

    def ends(self, text: str) -> bool:
        """Whether `text`, an answer so far, has reached a stop string."""
        return any(stop in text.lstrip() for stop in self.stop)


def file_of(task: Task, path: Path | None) -> Path:
    """The data file of a task that needs one. Raises ConfigError."""
    if path is None:
        raise ConfigError(f"the task {task.name} needs data: give --data FILE")
    return path


class FewShot(Task):
    """Questions with other questions and their answers before them.

    Attributes:
        demonstrations: in every prompt.
        pool: questions set aside as demonstrations: the first of the file.
    """

    needs_data: ClassVar[bool] = True

    demonstrations: int
    pool: int

    @abstractmethod
    def rows(self, path: Path) -> list[tuple[str, str]]:
        """Questions with their answers. Raises ConfigError."""

    @abstractmethod
    def prompt(
        self, path: Path, number: int, shown: Sequence[tuple[str, str]], question: str
    ) -> str:
        """A request for the answer to `question`, behind others that are `shown`.

        Args:
            path: the data file.
            number: makes the beginnings of requests different.
        """

    def items(self, path: Path | None, limit: int, seed: int) -> list[Item]:
        path = file_of(self, path)
        rows = self.rows(path)
        if len(rows) <= self.pool:
            raise ConfigError(
                f"{path} has {len(rows)} usable lines; the first {self.pool} serve as "
                "demonstrations, so there is no question left"
            )
        rng = np.random.default_rng(seed)
        examples, questions = rows[: self.pool], rows[self.pool :]
        items = []
        for i, (question, answer) in enumerate(questions[:limit]):
            target, donor = similar_examples(range(len(examples)), self.demonstrations, rng)
            numbers = rng.integers(1000, 10_000, 2)
            other = questions[(i + 1) % len(questions)][0]
            before, after = (
                self.prompt(path, int(number), [examples[k] for k in shown], asked)
                for number, shown, asked in zip(
                    numbers, (donor, target), (other, question), strict=True
                )
            )
            items.append(Item(f"{path.stem}-{i}", before, after, (answer,)))
        return items


def similar_examples(
    pool: Sequence[int], count: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Few-shot examples of a target and of its donor: alike, but no shared prefix to live on.

    Similar requests share demonstrations and differ in the item (arXiv 2503.16525). Retrieved
    demonstrations are rarely the same ones in the same order: here two neighbours change places,
    and one is another.

    Args:
        pool: what to draw from, at least ``count + 1``.
        count: examples of a prompt, at least 2.

    Returns:
        Indices for the target and for the donor.

    Raises:
        ConfigError: there is too little to draw from.
    """
    if len(pool) <= count:
        raise ConfigError(
            f"{count} demonstrations need more than {len(pool)} examples to draw from"
        )
    drawn = [int(i) for i in rng.choice(np.asarray(pool), count + 1, replace=False)]
    target, spare = drawn[:count], drawn[count]
    donor = list(target)
    at = int(rng.integers(count - 1))
    donor[at], donor[at + 1] = donor[at + 1], donor[at]
    donor[int(rng.integers(count))] = spare
    return target, donor
