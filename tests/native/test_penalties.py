"""Penalties and bias against a slow reference, and in whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm import InvalidRequestError, KVShare, RequestOptions
from kvshare_mm.sampling import Penalties, Sampler, SamplingParams

from .asking import _PROMPTS, params

CPU = torch.device("cpu")
ALONE = RequestOptions(reuse="off")
VOCAB = 12


def _logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def _reference(
    logits: Sequence[float], p: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """One token at a time, in float64: bias, then repetition, frequency and presence."""
    after = []
    for token, raw in enumerate(logits):
        logit = raw + p.logit_bias.get(token, 0.0)
        if token in prompt or token in answer:
            more = logit * p.repetition_penalty
            logit = logit / p.repetition_penalty if logit > 0 else more
        logit -= p.frequency_penalty * answer.count(token)
        logit -= p.presence_penalty * (token in answer)
        after.append(logit)
    return after


_FIELDS: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"presence_penalty": -2},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -1.1},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.4},
    {"logit_bias": {3: 4.5, 7: -100.0}},
    {
        "presence_penalty": 0.3,
        "frequency_penalty": 0.9,
        "repetition_penalty": 1.3,
        "logit_bias": {0: 2.0, 5: -1.0},
    },
]


@settings(max_examples=40)
@given(
    fields=st.sampled_from(_FIELDS),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 1e-5]),  # drawn where the best is all but certain
)
def test_answers_are_the_references(
    fields: dict[str, Any], prompt: list[int], seed: int, temperature: float
) -> None:
    p = SamplingParams(temperature=temperature, seed=seed, **fields)
    sampler = Sampler(p, CPU, np.array(prompt, np.int64))
    answer: list[int] = []
    for step in range(10):
        logits = _logits(seed + step % 2)
        after = _reference(logits.double().tolist(), p, prompt, answer)
        token, _ = sampler.sample(logits)
        assert after[token] == pytest.approx(max(after), abs=1e-4)
        answer.append(token)


@pytest.mark.parametrize("fields", _FIELDS)
def test_every_logit_is_the_references(fields: dict[str, Any]) -> None:
    p, prompt, answer = SamplingParams(**fields), [1, 2, 2, 9], [2, 2, 3, 4, 3, 2]
    penalties = Penalties(p, np.array([*prompt, VOCAB + 3]), CPU)  # an id beyond the logits
    logits = _logits(1)
    before = logits.clone()
    penalties.apply(logits)
    for token in answer:
        penalties.add(token)
    got = penalties.apply(logits)
    want = _reference(before.double().tolist(), p, prompt, answer)
    assert got.tolist() == pytest.approx(want, abs=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("factor", [1e-300, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
def test_extreme_penalties_still_give_a_token(factor: float, temperature: float) -> None:
    """The engine's thread draws: infinities would be an error there."""
    p = SamplingParams(repetition_penalty=factor, temperature=temperature, seed=0)
    sampler = Sampler(p, CPU, np.arange(VOCAB))
    assert all(0 <= sampler.sample(_logits(step) * 30)[0] < VOCAB for step in range(5))


def test_what_must_not_come_stays_out() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[2, 5]] = torch.tensor([1.0, 2.0])
    p = SamplingParams(
        temperature=1.0, seed=0, repetition_penalty=0.1, presence_penalty=-2, logit_bias={7: 100}
    )
    sampler = Sampler(p, CPU, np.arange(VOCAB))
    assert {sampler.sample(logits)[0] for _ in range(100)} <= {2, 5}


def test_logprobs_are_the_models_own() -> None:
    """vLLM's `raw_logprobs`: those of the model, before penalties and bias."""
    logits = _logits(3)
    p = SamplingParams(logit_bias={int(logits.argmin()): 100}, presence_penalty=2, logprobs=2)
    token, told = Sampler(p, CPU).sample(logits)
    want = logits.log_softmax(-1)
    assert token == int(logits.argmin()) and told is not None
    assert told.logprob == pytest.approx(float(want[token]), abs=1e-6)
    assert told.top[0] == (int(logits.argmax()), pytest.approx(float(want.max()), abs=1e-6))


# -- whole answers --------------------------------------------------------------------------


@pytest.mark.parametrize("fields", _FIELDS)
def test_answers_of_the_engine(llm: KVShare, fields: dict[str, Any]) -> None:
    """Each token of an answer is the best one by the reference over the logits of its step."""
    rows: list[list[float]] = []
    real = Sampler.sample

    def seen(self: Sampler, logits: torch.Tensor) -> Any:
        rows.append(logits.double().tolist())
        return real(self, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", seen)
        output = llm.generate(_PROMPTS[0], params(20, **fields), ALONE)
    p, answer = SamplingParams(**fields), list(output.token_ids)
    assert len(rows) == len(answer) == 20
    for step, row in enumerate(rows):
        after = _reference(row, p, output.prompt_token_ids, answer[:step])
        assert after[answer[step]] == pytest.approx(max(after), abs=1e-4)


def test_a_bias_on_a_token_that_the_model_lacks_is_refused(llm: KVShare) -> None:
    size = len(llm.tokenizer)
    assert llm.generate(_PROMPTS[0], max_tokens=1, logit_bias={size - 1: 1}).token_ids
    with pytest.raises(InvalidRequestError, match=rf"token {size}.*0\.\.{size - 1}") as raised:
        llm.generate(_PROMPTS[0], logit_bias={size: 1})
    assert raised.value.field == "logit_bias"
