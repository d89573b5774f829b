"""Training batches: one policy, greeting and photos, many questions that cannot see each other.

A context is computed once and several questions branch off behind it. An attention mask lets each
branch see the context and itself; positions restart behind the context. To the model every branch
is a request with one question, for a fraction of the price.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvshare_mm.assets.training.dialogues import TEXT_TOPICS, Question, Request, random_question
from kvshare_mm.assets.training.pictures import Photo
from kvshare_mm.assets.training.similar import random_request
from kvshare_mm.assets.training.tower import CELLS

# How often each topic is asked: more often where learning is slow.
_WEIGHTS = {
    "kind": 1.0,
    "colour": 1.0,
    "buttons": 1.5,
    "crack": 1.0,
    "code": 2.0,
    "order": 2.0,
    "name": 1.0,
    "warranty": 1.5,
    "days": 1.0,
    "city": 1.0,
    "my_warranty": 2.0,
    "my_fee": 1.5,
}
_GRID = 4  # image tokens a side


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token sequences of B contexts with their branches, S positions.

    Attributes:
        ids: int64 [B, S].
        positions: int64 [3, B, S], M-RoPE.
        visible: bool [B, 1, S, S], what each position may attend to.
        trained: bool [B, S], positions whose token is to be predicted.
        branch: int64 [B, S], running number of a position's branch in the batch; -1 elsewhere.
        topics: of each branch, with a 2 behind it where two photos stood.
        photos: all photos of the batch in order of their image tokens.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    trained: Tensor
    branch: Tensor
    topics: list[str]
    photos: list[Photo]


class Batcher:
    """Writes batches of dialogues as token ids."""

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        self.rng, self._tokenizer = rng, tokenizer
        special = tokenizer.convert_tokens_to_ids
        self.start, self.end = special("<|im_start|>"), special("<|im_end|>")
        self.vision = special("<|vision_start|>"), special("<|vision_end|>")
        self.image, self.pad = special("<|image_pad|>"), special("<|endoftext|>")
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(self._cache) < 100_000:
                self._cache[text] = ids
        return ids

    def context(self, request: Request) -> tuple[list[int], bool]:
        """Token ids up to the question, and whether the question needs a space in front."""
        ids = [self.start, *self.encode("system\n"), *self.encode(request.system_text()), self.end]
        ids += [*self.encode("\n"), self.start, *self.encode("user\n")]
        greeting = self.encode(request.greeting())
        pictures = [self.vision[0], *[self.image] * CELLS, self.vision[1]] * len(request.photos)
        if request.wording.photos_first:
            return ids + pictures + greeting, True
        return ids + self.encode(request.greeting() + " ") + pictures, False

    def turn(self, request: Request, space: bool) -> tuple[list[int], list[bool]]:
        """Question and answer: ids, and which of them are trained on."""
        question = self.encode((" " if space else "") + request.question_text())
        asked = [*question, self.end, *self.encode("\n"), self.start, *self.encode("assistant\n")]
        answer = [*self.encode(request.answer()), self.end]
        return asked + answer, [False] * len(asked) + [True] * len(answer)

    def dialogue(
        self, request: Request, questions: Sequence[Question], follow_up: float
    ) -> list[tuple[list[int], list[bool], str]]:
        """Branches: ids, trained, topic; some go on with a second question."""
        _, space = self.context(request)
        branches = []
        for index, question in enumerate(questions):
            ids, trained = self.turn(replace(request, question=question), space)
            if self.rng.random() < follow_up:
                again = questions[index - 1]
                between = [*self.encode("\n"), self.start, *self.encode("user\n")]
                more, wanted = self.turn(replace(request, question=again), False)
                ids = ids + between + more
                trained = trained + [False] * len(between) + wanted
            branches.append((ids, trained, question.topic))
        return branches

    def batch(self, tokens: int, *, branches: int, fillers: Sequence[int]) -> Batch:
        """A batch of about so many tokens, of contexts of one kind (alike in length)."""
        rng = self.rng
        num_photos = rng.choices((0, 1, 2), (0.05, 0.5, 0.45))[0]
        num_fillers = rng.choice(fillers)
        rows, photos, topics, total = [], [], [], 0
        while total < tokens:
            topic = "name" if num_photos == 0 else "kind"
            request = random_request(
                rng, topic, num_photos=num_photos, num_fillers=num_fillers, held_out=False
            )
            request = replace(request, policy=rng.random() < 0.9)
            known = [t for t in _WEIGHTS if num_photos or t in TEXT_TOPICS]
            if not request.policy:
                known = [t for t in known if not _asks_policy(request, t)]
            chosen = rng.choices(known, [_WEIGHTS[t] for t in known], k=branches)
            questions = [random_question(rng, topic, num_photos) for topic in chosen]
            row = (self.context(request)[0], self.dialogue(request, questions, 0.15))
            rows.append(row)
            photos += request.photos
            suffix = "2" if num_photos == 2 else ""
            topics += [t if t in TEXT_TOPICS else t + suffix for t in chosen]
            total += len(row[0]) + sum(len(branch[0]) for branch in row[1])
        return self._pack(rows, topics, photos)

    def repeats(self, rows: int) -> Batch:
        """Random tokens, repeated: predicting the second time is copying, and nothing else."""
        rng = self.rng
        digits = [self.encode(digit)[0] for digit in "0123456789"]
        length, first, gap = rng.randint(4, 14), rng.randint(0, 10), rng.randint(0, 10)
        packed: list[tuple[list[int], list[tuple[list[int], list[bool], str]]]] = []
        for row in range(rows):
            piece = self._random_ids(length)
            if row % 2:
                piece[2:] = rng.choices(digits, k=length - 2)
            ids = self._random_ids(first) + piece + self._random_ids(gap)
            again = piece + self._random_ids(3) + piece
            # the first token of a repetition cannot be known
            trained = [False] + [True] * (length - 1) + [False] * 4 + [True] * (length - 1)
            packed.append((ids, [(again, trained, "repeat")]))
        return self._pack(packed, ["repeat"] * rows, [])

    def _random_ids(self, count: int) -> list[int]:
        return [self.rng.randrange(self.start) for _ in range(count)]

    def _pack(
        self,
        rows: list[tuple[list[int], list[tuple[list[int], list[bool], str]]]],
        topics: list[str],
        photos: list[Photo],
    ) -> Batch:
        width = max(len(c) + sum(len(b[0]) for b in branches) for c, branches in rows)
        ids = torch.full((len(rows), width), self.pad)
        positions = torch.zeros((3, len(rows), width), dtype=torch.long)
        group = torch.full((len(rows), width), -1)  # 0 context, 1... branches, -1 padding
        branch = torch.full((len(rows), width), -1)
        trained = torch.zeros((len(rows), width), dtype=torch.bool)
        number = 0
        for row, (context, branches) in enumerate(rows):
            at = len(context)
            ids[row, :at] = torch.tensor(context)
            positions[:, row, :at], following = self.mrope(context)
            group[row, :at] = 0
            for index, (tokens, wanted, _) in enumerate(branches):
                span = slice(at, at + len(tokens))
                ids[row, span] = torch.tensor(tokens)
                positions[:, row, span] = following + torch.arange(len(tokens))
                group[row, span], branch[row, span] = index + 1, number
                trained[row, span] = torch.tensor(wanted)
                at += len(tokens)
                number += 1
        same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0)
        causal = torch.ones((width, width), dtype=torch.bool).tril()
        return Batch(ids, positions, (same & causal)[:, None], trained, branch, topics, photos)

    def mrope(self, ids: list[int]) -> tuple[Tensor, int]:
        """M-RoPE positions [3, S] of a context with 4x4 pictures, and the position behind it."""
        position, columns = 0, []
        at = 0
        while at < len(ids):
            if ids[at] == self.image:
                for row in range(_GRID):
                    columns += [(position, position + row, position + c) for c in range(_GRID)]
                position, at = position + _GRID, at + CELLS
            else:
                columns.append((position, position, position))
                position, at = position + 1, at + 1
        return torch.tensor(columns).T, position


def _asks_policy(request: Request, topic: str) -> bool:
    return replace(request, question=Question(topic)).needs_policy
