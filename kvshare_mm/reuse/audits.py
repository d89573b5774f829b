"""What an audit says: how far an answer was from full recompute, and what is learned from that.

Both engines audit; each computes in its own way.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kvshare_mm.errors import ModelOutputError
from kvshare_mm.reuse.calibration import Calibration
from kvshare_mm.reuse.plan import Promise, ReusePlan
from kvshare_mm.reuse.words import facts_of

# Tokens of an answer that are compared.
STEPS = 64
# Positions of a forward: nobody waits for more than one when they ask.
CHUNK = 64
# Where few audits are known, more is learned from: a fourth, until there are so many.
FIRST, FIRST_SHARE = 30, 0.25
# Upper bounds (nats) of what is counted together.
BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

Result = Literal["kept", "missed", "fact"]


class Compared(NamedTuple):
    """A token of an answer: KL(full || served) in nats, and what either would choose greedily."""

    kl: float
    full: int
    served: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far an answer was from what full recompute says to the same tokens.

    Attributes:
        first: KL(full || served) of the first token, nats.
        mean, worst: of all tokens that were compared.
        differs_at: the first token for which the two would choose another one greedily, or None.
        fact: a number or a name of the prompt that the donor did not have would be another, and
            not for rounding: the divergence there is larger than was asked for.
    """

    first: float
    mean: float
    worst: float
    differs_at: int | None
    fact: bool

    @classmethod
    def of(cls, compared: Sequence[Compared], facts: frozenset[int], asked: float) -> Divergence:
        """What was found, token by token.

        Args:
            facts: see `changed_facts`.
            asked: largest divergence that was asked for.
        """
        kls = [each.kl for each in compared]
        other = [i for i, each in enumerate(compared) if each.full != each.served]
        fact = any(facts.intersection(compared[i][1:]) and kls[i] > asked for i in other)
        return cls(kls[0], sum(kls) / len(kls), max(kls), other[0] if other else None, fact)

    @property
    def value(self) -> float:
        """The one number that a bound is about."""
        return max(self.first, self.mean)


def drawn(plan: ReusePlan, share: float, draw: random.Random, known: int) -> Promise | None:
    """What was promised to a request that is to be audited; None: it is not.

    Args:
        share: of the requests that reuse approximately, once audits are known.
        known: audits of its namespace.
    """
    promise = plan.promise
    if promise is None or not promise.ruled:
        return None
    chance = max(share, FIRST_SHARE) if share and known < FIRST else share
    return promise if promise.trial or draw.random() < chance else None


def changed_facts(
    tokenizer: PreTrainedTokenizerBase | None, plan: ReusePlan, token_ids: np.ndarray
) -> frozenset[int]:
    """Tokens of numbers and names in a prompt that its donors do not have there.

    Args:
        tokenizer: tells them; None: nothing does.
        token_ids: ``[plan.num_tokens]`` of the prompt.
    """
    changed = ~plan.kept
    if plan.unedited is not None:
        changed &= ~plan.unedited
    return facts_of(tokenizer, token_ids, changed) if tokenizer else frozenset()


def learn(calibration: Calibration, ns: str, promise: Promise, found: Divergence) -> Result:
    """Add an audit to the experience with its family; what came of it."""
    missed = calibration.observe(
        ns,
        promise.family,
        observed=found.value,
        bound=promise.bound,
        asked=promise.asked,
        expected=promise.expected,
        fact=found.fact,
        trial=promise.trial,
    )
    return "fact" if found.fact else "missed" if missed else "kept"


def compared(full: torch.Tensor, served: torch.Tensor) -> Compared:
    """A token, by the two logit vectors ``[vocab_size]``.

    Raises:
        ModelOutputError: logits that are no numbers.
    """
    kl = kl_divergence(full, served)
    if not math.isfinite(kl):
        raise ModelOutputError("logits that are no numbers")
    return Compared(kl, int(full.argmax()), int(served.argmax()))


def kl_divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """KL(full || other) in nats of two logit vectors ``[vocab_size]``; NaN if one holds any."""
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum())
    return kl if math.isnan(kl) else max(0.0, kl)
