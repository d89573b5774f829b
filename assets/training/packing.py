"""Contexts with branches: what is common is computed once, questions cannot see each other.

A context is followed by several branches, each a question and its answer. The mask lets a branch
see the context and itself; its positions go on behind the context. To the model every branch is a
request of its own, for a fraction of the price.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """Token ids behind a context, which of them are to be predicted, and what they are about."""

    ids: list[int]
    trained: list[bool]
    topic: str


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of a context and its branches."""

    context: list[int]
    branches: list[Branch]

    @property
    def num_tokens(self) -> int:
        return len(self.context) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class Packed:
    """Padded rows, B of S positions.

    Attributes:
        ids: int64 [B, S].
        positions: int64 [3, B, S].
        visible: bool [B, 1, S, S], what each position may attend to.
        trained: bool [B, S], positions whose token is to be predicted.
        branch: int64 [B, S], running number of a position's branch; -1 outside branches.
        topics: of the branches by that number.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    trained: Tensor
    branch: Tensor
    topics: list[str]


def one_axis(ids: list[int]) -> tuple[Tensor, int]:
    """Positions [3, S] of text, and the position behind it."""
    return torch.arange(len(ids)).expand(3, -1), len(ids)


def pack(
    rows: list[Row], pad: int, positions_of: Callable[[list[int]], tuple[Tensor, int]] = one_axis
) -> Packed:
    """Rows as tensors; ``positions_of`` gives a context's positions and the one behind them."""
    width = max(row.num_tokens for row in rows)
    ids = torch.full((len(rows), width), pad)
    positions = torch.zeros((3, len(rows), width), dtype=torch.long)
    group = torch.full((len(rows), width), -1)  # 0 context, 1... branches, -1 padding
    number = torch.full((len(rows), width), -1)
    trained = torch.zeros((len(rows), width), dtype=torch.bool)
    topics: list[str] = []
    for r, row in enumerate(rows):
        at = len(row.context)
        ids[r, :at] = torch.tensor(row.context)
        positions[:, r, :at], following = positions_of(row.context)
        group[r, :at] = 0
        for index, branch in enumerate(row.branches):
            span = slice(at, at + len(branch.ids))
            ids[r, span] = torch.tensor(branch.ids)
            positions[:, r, span] = following + torch.arange(len(branch.ids))
            group[r, span], number[r, span] = index + 1, len(topics)
            trained[r, span] = torch.tensor(branch.trained)
            topics.append(branch.topic)
            at += len(branch.ids)
    same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0)
    causal = torch.ones((width, width), dtype=torch.bool).tril()
    return Packed(ids, positions, (same & causal)[:, None], trained, number, topics)


def answer_loss(packed: Packed, logits: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of what is to be predicted, and the share of branches right in every token.

    Args:
        packed: the batch.
        logits: [N, vocabulary] at the positions in front of its N trained ones.
    """
    wanted = packed.trained[:, 1:]
    target, branch = packed.ids[:, 1:][wanted], packed.branch[:, 1:][wanted]
    wrong = torch.zeros(len(packed.topics)).index_add_(
        0, branch, (logits.argmax(-1) != target).float()
    )
    right: dict[str, list[float]] = {}
    for topic, count in zip(packed.topics, wrong.tolist(), strict=True):
        right.setdefault(topic, []).append(float(count == 0))
    exact = {topic: sum(values) / len(values) for topic, values in right.items()}
    return torch.nn.functional.cross_entropy(logits, target), exact
