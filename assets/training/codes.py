"""A code that pictures are told in: fixed, nearly the only thing vision and language agree on.

Every attribute value has one vector; the vectors are orthogonal. The decoder first learns to read
sums of them in place of image tokens, the tower learns to produce these sums from pixels: both at
the same time and neither waiting for the other. Training both together afterwards frees them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kvshare_mm.assets.shop.pictures import (
    CELL,
    COLOURS,
    KINDS,
    MAX_BUTTONS,
    SIZE,
    Marks,
    Photo,
)
from kvshare_mm.assets.training.tower import CELLS

ATTRIBUTES = ("kind", "colour", "buttons", "crack", "digit1", "digit2")
SIZES = (len(KINDS), len(COLOURS), MAX_BUTTONS, 2, 10, 10)
NORM = 0.4
LOCAL_SIZES = (11, 11, MAX_BUTTONS + 1, 2)  # first digit, second digit, buttons, crack in a cell
_SHARPNESS = 8.0
_COLOUR_NAMES = tuple(COLOURS)


def codebook(hidden: int) -> Tensor:
    """[sum of SIZES, hidden]: orthogonal rows of norm :data:`NORM`, always the same."""
    generator = torch.Generator().manual_seed(20)
    square = torch.randn(hidden, hidden, generator=generator)
    rows: Tensor = torch.linalg.qr(square)[0][: sum(SIZES)] * NORM
    return rows


def labels(photo: Photo) -> tuple[int, ...]:
    """One class a attribute, in the order of :data:`ATTRIBUTES`."""
    return (
        KINDS.index(photo.kind),
        _COLOUR_NAMES.index(photo.colour),
        photo.buttons - 1,
        int(photo.cracked),
        int(photo.code[0]),
        int(photo.code[1]),
    )


def local_labels(photo: Photo, marks: Marks) -> list[list[int]]:
    """[16][4]: classes of each cell, in the order of :data:`LOCAL_SIZES`."""
    cells = [[10, 10, 0, 0] for _ in range(CELLS)]
    for place, (x, y) in enumerate(marks.digits):
        cells[_cell(x, y)][place] = int(photo.code[place])
    for x, y in marks.buttons:
        cells[_cell(x, y)][2] += 1
    for x, y in marks.crack:
        cells[_cell(x, y)][3] = 1
    return cells


def oracle(book: Tensor, photos: list[Photo], generator: torch.Generator) -> Tensor:
    """[B, 16, hidden]: what a perfect tower would say of the photos, with noise.

    A part of the noise is shared by a picture's tokens, as a tower's mistakes are.
    """
    offsets = torch.tensor(SIZES).cumsum(0) - torch.tensor(SIZES)
    index = torch.tensor([labels(photo) for photo in photos]) + offsets
    clean = book[index].sum(1, keepdim=True).expand(-1, CELLS, -1)
    scale = NORM / book.shape[1] ** 0.5
    own = torch.randn(clean.shape, generator=generator) * 0.5
    shared = torch.randn((len(photos), 1, book.shape[1]), generator=generator) * 0.25
    noisy: Tensor = clean + scale * (own + shared)
    return noisy


def code_loss(book: Tensor, tokens: Tensor, photos: list[Photo]) -> tuple[Tensor, list[float]]:
    """How far image tokens [B, 16, hidden] are from the code, and each attribute's accuracy."""
    scores = tokens @ book.T / NORM**2
    target = torch.tensor([labels(photo) for photo in photos])
    wanted = torch.zeros(len(photos), book.shape[1])
    loss, start, accuracy = torch.zeros(()), 0, []
    for column, size in enumerate(SIZES):
        part = scores[..., start : start + size]
        truth = target[:, column]
        wanted = wanted + book[start + truth]
        flat = truth[:, None].expand(-1, CELLS).reshape(-1)
        loss = loss + functional.cross_entropy(_SHARPNESS * part.reshape(-1, size), flat)
        accuracy.append(float((part.mean(1).argmax(-1) == truth).float().mean()))
        start += size
    distance = (tokens - wanted[:, None]).square().sum(-1).mean() / NORM**2
    return loss + 0.5 * distance, accuracy


def local_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of logits [B, 16, sum of LOCAL_SIZES] against classes [B, 16, 4]."""
    loss = torch.zeros(())
    for column, part in enumerate(logits.split(LOCAL_SIZES, -1)):
        loss = loss + functional.cross_entropy(part.flatten(0, 1), truth[..., column].flatten())
    return loss


def _cell(x: float, y: float) -> int:
    last = SIZE // CELL - 1
    column, row = min(last, max(0, int(x // CELL))), min(last, max(0, int(y // CELL)))
    return row * (last + 1) + column
