"""Training batches of desk dialogues, and of random tokens that repeat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvshare_mm.assets.shop.dialogues import Question, Request, random_question
from kvshare_mm.assets.shop.phrases import TEXT_TOPICS
from kvshare_mm.assets.shop.pictures import Photo
from kvshare_mm.assets.shop.similar import random_request
from kvshare_mm.assets.training.packing import Branch, Packed, Row, pack
from kvshare_mm.assets.training.tower import CELLS

# How often each topic is asked with at most one photo, and with two: more often where learning is
# slow. Which photo a question means is learned topic by topic, kinds, counts and codes last.
WEIGHTS = {
    "kind": (1.0, 2.5),
    "colour": (0.7, 0.5),
    "buttons": (2.0, 10.0),
    "crack": (0.7, 0.5),
    "code": (2.0, 2.5),
    "order": (1.5, 0.4),
    "name": (0.5, 0.2),
    "warranty": (1.5, 0.3),
    "days": (0.8, 0.2),
    "city": (0.5, 0.2),
    "my_warranty": (1.5, 2.0),
    "my_fee": (1.5, 1.0),
}
_DRILLS = 0.4  # share of two-photo batches without a policy: short, so many questions fit
_FOLLOW_UPS = 0.15  # share of branches that go on with a second question
_GRID = 4  # image tokens per side


class Batcher:
    """Writes dialogues as token ids, exactly as the processor does."""

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

    def row(self, request: Request, questions: Sequence[Question]) -> Row:
        """One context with all the questions; some go on with another one of them."""
        context, space = self.context(request)
        branches = []
        for index, question in enumerate(questions):
            ids, trained = self.turn(replace(request, question=question), space)
            if self.rng.random() < _FOLLOW_UPS:
                between = [*self.encode("\n"), self.start, *self.encode("user\n")]
                more, wanted = self.turn(replace(request, question=questions[index - 1]), False)
                ids = ids + between + more
                trained = trained + [False] * len(between) + wanted
            two = len(request.photos) == 2 and question.topic not in TEXT_TOPICS
            branches.append(Branch(ids, trained, question.topic + ("2" if two else "")))
        return Row(context, branches)

    def batch(
        self, tokens: int, *, branches: int, fillers: Sequence[int]
    ) -> tuple[Packed, list[Photo]]:
        """A batch of about so many tokens, contexts of one kind and length, and its photos."""
        rng = self.rng
        num_photos = rng.choices((0, 1, 2), (0.03, 0.27, 0.7))[0]
        drill = num_photos == 2 and rng.random() < _DRILLS
        num_fillers = 0 if drill else rng.choice(fillers)
        rows: list[Row] = []
        photos: list[Photo] = []
        while sum(row.num_tokens for row in rows) < tokens:
            request = random_request(
                rng, "name", num_photos=num_photos, num_fillers=num_fillers, held_out=False
            )
            request = replace(request, policy=not drill and rng.random() < 0.9)
            known = [
                topic
                for topic in WEIGHTS
                if (num_photos or topic in TEXT_TOPICS)
                and (request.policy or not Question(topic).needs_policy)
            ]
            weights = [WEIGHTS[topic][num_photos == 2] for topic in known]
            chosen = rng.choices(known, weights, k=branches // max(1, num_photos))
            # The same question of both photos in one row: nothing but the ordinal tells the
            # answers apart, which is what has to be learned.
            questions = [
                replace(random_question(rng, topic, num_photos), photo=photo)
                for topic in chosen
                for photo in range(max(1, num_photos))
            ]
            rows.append(self.row(request, questions))
            photos += request.photos
        return pack(rows, self.pad, self.mrope), photos

    def repeats(self, count: int) -> Packed:
        """Random tokens, repeated: predicting the second time is copying, and nothing else."""
        rng = self.rng
        digits = [self.encode(digit)[0] for digit in "0123456789"]
        length, first, gap = rng.randint(4, 14), rng.randint(0, 10), rng.randint(0, 10)
        rows = []
        for index in range(count):
            piece = self._random_ids(length)
            if index % 2:
                piece[2:] = rng.choices(digits, k=length - 2)
            ids = self._random_ids(first) + piece + self._random_ids(gap)
            again = piece + self._random_ids(3) + piece
            # the first token of a repetition cannot be known
            trained = [False] + [True] * (length - 1) + [False] * 4 + [True] * (length - 1)
            rows.append(Row(ids, [Branch(again, trained, "repeat")]))
        return pack(rows, self.pad)

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

    def _random_ids(self, count: int) -> list[int]:
        return [self.rng.randrange(self.start) for _ in range(count)]
