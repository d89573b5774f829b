"""Sampling against a slow reference, and the validation of every parameter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.errors import InvalidRequestError, KVShareError, ModelOutputError
from kvshare_mm.sampling import Sampler, SamplingParams

CPU = torch.device("cpu")


def _logits(n: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def _support(logits: torch.Tensor, p: SamplingParams) -> tuple[set[int], np.ndarray]:
    """Tokens that may be drawn, and their probabilities: one token at a time, in float64."""
    scaled = logits.double().numpy() / p.temperature
    ranked = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = ranked[: p.top_k] if p.top_k > 0 else ranked
    weight = {i: math.exp(scaled[i] - scaled[ranked[0]]) for i in kept}
    kept = [i for i in kept if weight[i] >= p.min_p * weight[ranked[0]]]
    total, before, chosen = sum(weight[i] for i in kept), 0.0, []
    for i in kept:
        if chosen and before >= p.top_p * total:
            break
        chosen.append(i)
        before += weight[i]
    probs = np.zeros(len(scaled))
    probs[chosen] = [weight[i] for i in chosen]
    return set(chosen), probs / probs.sum()


def _draws(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    sampler = Sampler(params, CPU)
    return [sampler.sample(logits)[0] for _ in range(count)]


# -- greedy ---------------------------------------------------------------------------------


def test_greedy_is_argmax_whatever_else_is_set() -> None:
    logits = _logits(50, 0)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0, top_p=0.1, top_k=3, min_p=0.5, seed=7),
        SamplingParams(temperature=0.0),
    ):
        assert Sampler(params, CPU).sample(logits) == (int(logits.argmax()), None)


def test_sampling_does_not_change_the_logits() -> None:
    logits = _logits(50, 0)
    before = logits.clone()
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.8, min_p=0.01, logprobs=3)
    Sampler(params, CPU).sample(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits = _logits(50, 0).to(dtype)
    assert Sampler(SamplingParams(), CPU).sample(logits)[0] == int(logits.float().argmax())
    params = SamplingParams(temperature=1.0, top_k=1, seed=1)
    assert _draws(logits, params, 5) == [int(logits.float().argmax())] * 5


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
@pytest.mark.parametrize("logprobs", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", ["a nan", "all nan", "an infinity", "nothing"])
def test_logits_that_are_no_numbers_are_an_error(
    bad: str, dtype: torch.dtype, logprobs: int | None, options: dict[str, Any]
) -> None:
    logits = _logits(50, 0)
    logits[7:20] = -INF
    if bad == "a nan":
        logits[30] = NAN
    elif bad == "an infinity":
        logits[30] = INF
    else:
        logits[:] = NAN if bad == "all nan" else -INF
    sampler = Sampler(SamplingParams(seed=0, logprobs=logprobs, **options), CPU)
    with pytest.raises(ModelOutputError, match="not a number") as caught:
        sampler.sample(logits.to(dtype))
    assert isinstance(caught.value, KVShareError)


# -- seeds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 12345, -1, -(2**63), 2**63, 2**64 - 1])
def test_a_seed_makes_it_repeatable(seed: int) -> None:
    logits = _logits(200, 1)
    params = SamplingParams(temperature=1.0, seed=seed)
    assert _draws(logits, params, 30) == _draws(logits, params, 30)


def test_seeds_differ_and_so_do_requests_without_one() -> None:
    logits = torch.zeros(1000)
    seeded = [_draws(logits, SamplingParams(temperature=1.0, seed=s), 8) for s in (1, 2)]
    free = [_draws(logits, SamplingParams(temperature=1.0), 8) for _ in range(2)]
    assert len({tuple(d) for d in (*seeded, *free)}) == 4


def test_requests_do_not_share_their_generator() -> None:
    """A seeded request gets the same tokens whoever else samples in between."""
    logits, params = _logits(200, 1), SamplingParams(temperature=1.0, seed=5)
    alone = _draws(logits, params, 10)
    sampler, other = Sampler(params, CPU), Sampler(SamplingParams(temperature=1.0), CPU)
    mixed = []
    for _ in range(10):
        other.sample(logits)
        torch.rand(3)
        mixed.append(sampler.sample(logits)[0])
    assert mixed == alone


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    _draws(_logits(50, 0), SamplingParams(temperature=1.0), 5)
    assert torch.equal(torch.rand(4), want)


# -- support --------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    n=st.integers(2, 30),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 1.7, 5.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 29, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]),
)
def test_only_what_the_filters_keep_is_drawn(
    n: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = _logits(n, seed)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    support, probs = _support(logits, params)
    drawn = _draws(logits, params, 150)
    assert set(drawn) <= support
    # What is likely enough to be drawn (missed once in 10^9 otherwise) is drawn.
    assert {i for i in support if (1 - probs[i]) ** 150 < 1e-9} <= set(drawn)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_p": 0.0001}, 1),
        ({"top_p": 0.5}, 1),  # the first has 0.5 exactly
        ({"top_p": 0.51}, 2),
        ({"top_p": 0.9}, 4),
        ({"min_p": 0.3}, 2),
        ({"min_p": 1.0}, 1),
        ({"top_k": 2, "top_p": 0.7}, 2),  # of what top_k keeps, not of all
        ({"top_k": 3, "top_p": 0.7}, 2),
        ({}, 5),
    ],
)
def test_support_by_hand(options: dict[str, Any], size: int) -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()[[3, 0, 4, 1, 2]]
    rank = [1, 3, 4, 0, 2]
    drawn = set(_draws(logits, SamplingParams(temperature=1.0, seed=0, **options), 400))
    if size == 4:  # the two last are equally likely: either may be the fourth
        assert {1, 3, 4} < drawn and len(drawn) == 4
    else:
        assert drawn == set(rank[:size])


def test_frequencies_follow_the_probabilities() -> None:
    logits = _logits(6, 4, scale=1.0)
    params = SamplingParams(temperature=0.8, top_k=5, seed=0)
    _, probs = _support(logits, params)
    count = 6000
    got = np.bincount(_draws(logits, params, count), minlength=6) / count
    assert np.abs(got - probs).max() < 5 * 0.5 / math.sqrt(count)


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((20,), float("-inf"))
    logits[[3, 11]] = torch.tensor([1.0, 2.0])
    params = SamplingParams(temperature=1.0, top_k=5, top_p=0.999999, seed=0)
    assert set(_draws(logits, params, 200)) == {3, 11}


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 5e-324},
        {"top_p": 1e-50},
        {"temperature": 1e-6},
        {"temperature": 1e-40},
        {"temperature": 5e-324},
        {"temperature": 1e-40, "top_k": 2, "top_p": 1e-50, "min_p": 1.0},
        {"temperature": 100, "min_p": 1e-300},
    ],
)
def test_extreme_values_that_are_allowed_still_give_a_token(options: dict[str, Any]) -> None:
    """The engine's thread draws: an error in here would end all requests."""
    logits = _logits(40, 2, scale=10.0)
    params = SamplingParams(**{"temperature": 1.0, "seed": 0, **options})
    drawn = set(_draws(logits, params, 10))
    assert drawn <= set(range(40))
    if options.get("temperature", 1) < 1 or "top_p" in options:
        assert drawn == {int(logits.argmax())}


# -- log probabilities ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs(temperature: float, count: int) -> None:
    logits = _logits(50, 3)
    params = SamplingParams(temperature=temperature, top_k=8, seed=1, logprobs=count)
    token, told = Sampler(params, CPU).sample(logits)
    want = logits.double() - logits.double().exp().sum().log()
    assert told is not None
    assert told.token_id == token
    assert told.logprob == pytest.approx(float(want[token]), abs=1e-5)
    order = sorted(range(50), key=lambda i: -float(want[i]))[:count]
    assert [i for i, _ in told.top] == order
    assert [p for _, p in told.top] == pytest.approx([float(want[i]) for i in order], abs=1e-5)
    assert all(isinstance(i, int) and isinstance(p, float) for i, p in told.top)


def test_more_logprobs_than_tokens() -> None:
    _, told = Sampler(SamplingParams(logprobs=20), CPU).sample(_logits(7, 3))
    assert told is not None and len(told.top) == 7


def test_no_logprobs_unless_asked_for() -> None:
    assert Sampler(SamplingParams(temperature=1.0), CPU).sample(_logits(7, 3))[1] is None


# -- validation -----------------------------------------------------------------------------

BAD: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.5, "10", True, INF],
    "temperature": [-0.1, 100.1, NAN, INF, -INF, "hot", None, True],
    "top_p": [0, 0.0, -0.5, 1.1, NAN, INF, "0.9", None, True],
    "top_k": [-2, 1.0, 2.5, "5", None, True, NAN],
    "min_p": [-0.1, 1.1, NAN, "0", None, False],
    "seed": [1.0, "7", True, 2**64, -(2**63) - 1],
    "stop": [
        5,
        0,
        1.5,
        True,
        False,
        "",
        [""],
        ["ok", ""],
        [1],
        ["a", None],
        [["a"]],
        [b"a"],
        b"abc",
    ],
    "ignore_eos": ["no", 1, None],
    "logprobs": [-1, 21, 1.0, "5", True],
    "presence_penalty": [-2.01, 2.01, NAN, INF, "1", None, True],
    "frequency_penalty": [-2.01, 2.01, NAN, INF, "1", None, True],
    "repetition_penalty": [0, -1, NAN, INF, "1", None, True],
    "logit_bias": [
        [5],
        {"5": 1},
        {-1: 1},
        {True: 1},
        {5: 100.1},
        {5: -100.1},
        {5: NAN},
        {5: None},
        dict.fromkeys(range(1025), 1),
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=repr
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, KVShareError)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, 10**9, None]),
        ("temperature", [0, 0.0, 1, 2.5, 100]),
        ("top_p", [1, 1.0, 1e-9]),
        ("top_k", [-1, 0, 1, 10**9]),
        ("min_p", [0, 1, 0.5]),
        ("seed", [None, 0, -1, -(2**63), 2**64 - 1]),
        ("stop", ["end", ["a", "b"], ("a",), (), [], None]),
        ("ignore_eos", [True, False]),
        ("logprobs", [None, 0, 20]),
        ("presence_penalty", [-2, 2, 0.5]),
        ("frequency_penalty", [-2, 2, 0.5]),
        ("repetition_penalty", [1e-300, 1, 1e300]),
        ("logit_bias", [None, {}, {0: -100}, {5: 100}, dict.fromkeys(range(1024), 1)]),
    ],
)
def test_values_at_the_edge_are_taken(name: str, values: list[Any]) -> None:
    for value in values:
        SamplingParams(**{name: value})


def test_stop_becomes_a_tuple() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


def test_stops_are_bounded() -> None:
    """Each is looked for in every piece of text: 400,000 of them held all others up for 11 s."""
    assert len(SamplingParams(stop=["x" * 1024] * 64).stop) == 64
    for stop in (["x"] * 65, ["x" * 1025], "x" * 1_000_000):
        with pytest.raises(InvalidRequestError, match="stop=") as raised:
            SamplingParams(stop=stop)
        assert len(str(raised.value)) < 300
