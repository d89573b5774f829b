"""A careless request changes nothing for others: real letters, a real model.

Letters of one form with other names and numbers, asked for what is easily copied wrong. Each is
served on a pool of careful requests, and again when careless ones have been stored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvshare_mm import KVShare, RequestOptions, RequestOutput, SamplingParams
from kvshare_mm.native.prefill import PrefillResult
from kvshare_mm.native.waiting import WaitingRequests
from kvshare_mm.reuse.audits import kl_divergence
from kvshare_mm.stream import SegmentStream

from .watched import watch_prefills

pytestmark = pytest.mark.e2e

_PARAMS = SamplingParams(max_tokens=14)
_LETTERS = 5
_CARELESS = ["none", "window:2", "tail:8", "auto:10", "none"]


@dataclass
class Probe:
    """A server, and the logits of the last prefill."""

    llm: KVShare
    logits: Any = None

    def ask(self, prompt: str, **options: Any) -> tuple[RequestOutput, Any]:
        output = self.llm.generate(prompt, _PARAMS, RequestOptions(**options))
        return output, self.logits

    def full(self, prompt: str) -> tuple[RequestOutput, Any]:
        return self.ask(prompt, reuse="off", store=False)


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    with (
        pytest.MonkeyPatch.context() as patch,
        KVShare("smollm2", embedder=None, max_num_seqs=1) as llm,
    ):
        patch.setattr(WaitingRequests, "MAX_HOLD_S", 60)  # donors are waited for, however busy
        probe = Probe(llm)

        def record(slot: int, stream: SegmentStream, ns: str, result: PrefillResult) -> None:
            probe.logits = result.logits.clone()

        watch_prefills(llm, record)
        yield probe


def letter(rng: random.Random, question: str) -> str:
    def number(n: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(n))

    name = rng.choice(["Ines Weber", "Paul Ott", "Rosa Marti", "Karl Frei"])
    return (
        f"<|im_start|>user\nTo the customers' office. I am {name}, and this is about order "
        f"{number(6)}, a {rng.choice(['lamp', 'kettle', 'chair', 'radio'])} that came to house "
        f"{number(3)} on day {number(2)}. According to invoice {number(7)} I paid {number(3)} "
        "francs. When the parcel was opened the glass was broken, and two calls to the seller "
        "have led to nothing. I ask for a new one, or for my money, within the usual time. Tell "
        "me please where the broken one is to be sent, and who pays for that. Many thanks.\n"
        f"{question}<|im_end|>\n<|im_start|>assistant\nThe order number is"
    )


_REPEAT = "Repeat the order number, the house number and the invoice number."


def test_who_asks_strictly_gets_full_recomputes_answer_whatever_is_stored(probe: Probe) -> None:
    rng = random.Random(11)
    for i in range(_LETTERS):
        salt = f"strict {i}"
        donor, target = letter(rng, _REPEAT), letter(rng, _REPEAT)
        probe.ask(donor, cache_salt=salt)
        probe.ask(target, cache_salt=salt, repair=rng.choice(_CARELESS))
        other = target.replace(_REPEAT, "Name all numbers of this letter.")
        for prompt, bound in ((target, 1e-6), (other, 0.0), (f"{target} 1", 1e-6)):
            want, logits = probe.full(prompt)
            got, found = probe.ask(prompt, cache_salt=salt, max_divergence=bound)
            assert got.token_ids == want.token_ids
            assert kl_divergence(logits, found) <= 1e-6


def test_over_careless_histories_the_default_keeps_its_bound_as_on_fresh_donors(
    probe: Probe,
) -> None:
    rng = random.Random(12)
    fresh: list[float] = []
    after: list[float] = []
    same_fresh = same_after = 0
    for i in range(_LETTERS):
        donor, target = letter(rng, _REPEAT), letter(rng, _REPEAT)
        want, logits = probe.full(target)
        probe.ask(donor, cache_salt=f"fresh {i}")
        got, found = probe.ask(target, cache_salt=f"fresh {i}", store=False)
        fresh.append(kl_divergence(logits, found))
        same_fresh += got.token_ids == want.token_ids
        salt = f"after {i}"
        probe.ask(donor, cache_salt=salt)
        for _ in range(3):  # the same letter, and edits of it, over one another
            careless = target if rng.random() < 0.5 else target.replace(" francs", " Swiss francs")
            probe.ask(careless, cache_salt=salt, repair=rng.choice(_CARELESS))
        got, found = probe.ask(target, cache_salt=salt)
        after.append(kl_divergence(logits, found))
        same_after += got.token_ids == want.token_ids
    bound = 0.01
    assert np.sum(np.array(after) > bound) <= np.sum(np.array(fresh) > bound) + 0.05 * _LETTERS
    assert same_after >= same_fresh - 1, (same_fresh, same_after)


def test_turns_behind_a_careless_one_keep_their_own_bound(probe: Probe) -> None:
    rng = random.Random(13)
    for i in range(2):
        salt = f"turns {i}"
        donor, target = letter(rng, _REPEAT), letter(rng, _REPEAT)
        probe.ask(donor, cache_salt=salt)
        conversation = target
        for turn in range(3):
            output, _ = probe.ask(conversation, cache_salt=salt, repair="none")
            assert output.provenance.reused
            conversation += f"{output.text}<|im_end|>\n<|im_start|>user\nAnd the invoice?"
            conversation += "<|im_end|>\n<|im_start|>assistant\nIt is"
            want, logits = probe.full(conversation)
            got, found = probe.ask(conversation, cache_salt=salt, max_divergence=0, store=False)
            assert got.token_ids == want.token_ids, turn
            assert kl_divergence(logits, found) <= 1e-6
