"""How far served requests are from full recompute, and how numbers of many are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvshare_mm.apps.bench.rig import Served
from kvshare_mm.reuse.audits import kl_divergence
from kvshare_mm.reuse.plan import ReusePlan


def against(full: Served, other: Served) -> dict[str, Any]:
    """A prompt served in some way beside full recompute of it, JSON-ready."""
    one, two = full.result.logits, other.result.logits
    return {
        **other.cost,
        "kl_first_token": kl_divergence(one, two),
        "first_token_same": bool(one.argmax() == two.argmax()),
    }


def spread(values: Sequence[float], *percentiles: int) -> dict[str, float | None]:
    """The mean, and percentiles by name: p50, p90, ...; each is None if there are no values."""
    if not values:
        return dict.fromkeys(("mean", *(f"p{p}" for p in percentiles)))
    found = np.percentile(values, percentiles)
    named = {f"p{p}": float(v) for p, v in zip(percentiles, found, strict=True)}
    return {"mean": float(np.mean(values)), **named}


def agreement(full: Sequence[int], other: Sequence[int]) -> float:
    """Length of the common beginning of two greedy answers over the full answer's length."""
    same = 0
    for a, b in zip(full, other, strict=False):
        if a != b:
            break
        same += 1
    return same / len(full)


@dataclass(frozen=True, slots=True)
class KVDeviation:
    """Relative L2 deviation of reused KV from full recompute, mean over positions, by layer.

    Attributes:
        key: ``num_layers`` values; 0.1 means off by a tenth of the key's length.
        value: the same of V.
        positions: how many reused positions were compared.
    """

    key: tuple[float, ...]
    value: tuple[float, ...]
    positions: int


def kv_deviation(
    plan: ReusePlan,
    full: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
) -> KVDeviation | None:
    """Compare the KV of a plan's reused positions (approximate and not repaired).

    Args:
        plan: what `other` was served with.
        full: K and V of full recompute, each ``[num_layers, num_kv_heads, >= N, head_dim]``.
        other: the same of the method.

    Returns:
        The deviation, or None if nothing was reused approximately.
    """
    index = torch.from_numpy(np.flatnonzero(plan.reused))
    if not len(index):
        return None
    key, value = (tuple(_relative(a, b, index).tolist()) for a, b in zip(full, other, strict=True))
    return KVDeviation(key, value, len(index))


def mean_deviation(parts: Sequence[KVDeviation]) -> KVDeviation | None:
    """The mean over all positions of several requests; None if there are none."""
    if not parts:
        return None
    weights = np.array([p.positions for p in parts], dtype=float)
    key: NDArray[np.float64] = np.average([p.key for p in parts], axis=0, weights=weights)
    value: NDArray[np.float64] = np.average([p.value for p in parts], axis=0, weights=weights)
    return KVDeviation(tuple(key.tolist()), tuple(value.tolist()), int(weights.sum()))


def _relative(full: torch.Tensor, other: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``[num_layers]``: |other - full| / |full|, norms over heads and channels, mean over index."""
    index = index.to(full.device)
    truth = full.index_select(2, index).double()
    difference = other.index_select(2, index).double() - truth
    norms: torch.Tensor = truth.norm(dim=(1, 3)).clamp_min(1e-12)
    relative: torch.Tensor = difference.norm(dim=(1, 3)) / norms
    return relative.mean(-1)
