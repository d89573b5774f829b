"""What a model is given for a prompt: token ids, rotary positions, features in place of media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True, eq=False)
class MediaInputs:
    """What a prompt holds beyond its token ids.

    Attributes:
        positions: ``[3, N]`` int64 rotary positions; None: the index.
        features: (first position, ``[length, hidden_size]``) of media that are to be computed; with
            more channels, what the first layers add there too, see `models.family.Family.encode`.
    """

    positions: np.ndarray | None = None
    features: tuple[tuple[int, torch.Tensor], ...] = ()

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """``[start, end)`` of the media that are to be computed."""
        return tuple((start, start + len(features)) for start, features in self.features)


def model_inputs(
    model: Any, ids: torch.Tensor, index: torch.Tensor, media: MediaInputs | None
) -> dict[str, Any]:
    """Keywords of a forward over some positions of a prompt.

    Args:
        ids: ``[N]`` the whole prompt.
        index: ``[n]`` the positions, ascending.
    """
    tokens = ids[index][None]
    if media is None:
        return {"input_ids": tokens, "position_ids": index[None]}
    positions = index[None]
    if media.positions is not None:
        positions = torch.from_numpy(media.positions).to(index.device)[:, index][:, None]
    here = [
        (rows, features[index[rows] - start])
        for start, features in media.features
        if len(rows := ((index >= start) & (index < start + len(features))).nonzero()[:, 0])
    ]
    if not here:
        return {"input_ids": tokens, "position_ids": positions}
    tokens = tokens.clone()
    for rows, _ in here:  # what stands for a medium need not be in the vocabulary
        tokens[0, rows] = 0
    embeddings = model.get_input_embeddings()(tokens)
    width = embeddings.shape[-1]
    for rows, features in here:
        embeddings[0, rows] = features[:, :width].to(embeddings)
    inputs = {"inputs_embeds": embeddings, "position_ids": positions}
    # A model has them for all of its media or for none.
    _, *deep = torch.cat([features for _, features in here]).split(width, dim=-1)
    if not deep:
        return inputs
    visual = torch.zeros_like(tokens, dtype=torch.bool)
    for rows, _ in here:
        visual[0, rows] = True
    return {**inputs, "visual_pos_masks": visual, "deepstack_visual_embeds": deep}


def fitting(compute: np.ndarray, most: int, whole: Sequence[tuple[int, int]]) -> int:
    """How many of the positions `compute` (ascending) the next forward takes.

    Args:
        most: so many, unless that would cut a medium: then fewer, or all of one that is longer.
        whole: ``[start, end)`` of media whose positions see each other. Those of one that are
            computed at all are computed in one forward; the others' KV is there already.
    """
    for start, end in whole:
        low, high = (int(at) for at in np.searchsorted(compute, (start, end)))
        if low < most < high:
            return low or high
    return min(most, len(compute))


def seen(index: torch.Tensor, whole: Sequence[tuple[int, int]]) -> torch.Tensor | None:
    """``[n]``, the last position that each of `index` (``[n]``) sees: its own, or the end of the
    medium of `whole` that it stands in; None: none stands in one."""
    found = None
    for start, end in whole:
        inside = (index >= start) & (index < end)
        found = torch.where(inside, end - 1, index if found is None else found)
    return found


def decode_positions(index: torch.Tensor, rope_deltas: torch.Tensor) -> torch.Tensor:
    """Rotary positions of answer tokens, ``[1, n]``: on every axis what follows the prompt."""
    return (index + rope_deltas)[None]


def followed_by(prompt: dict[str, Any], answers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Keywords of a forward over positions of a prompt, none of them media, and answers' tokens
    behind them."""
    at, behind = prompt["position_ids"], answers["position_ids"]
    return {
        "input_ids": torch.cat((prompt["input_ids"], answers["input_ids"]), dim=1),
        "position_ids": torch.cat((at, behind.expand(*at.shape[:-1], -1)), dim=-1),
    }
