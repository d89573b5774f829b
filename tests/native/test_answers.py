"""What comes of a request: its answer's end, chunks, seeds, log-probabilities, and accounts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm import KVShare, RequestOptions, RequestOutput, SamplingParams

from .asking import _DONOR, _PROMPTS, _TARGET, Gate, Inbox, OpenLLM, inside, outcomes, params
from .schemas import SCHEMAS, json_schema

# -- when an answer ends: its length, the context, the end token, stop strings ---------------------


@pytest.mark.parametrize("wanted", [None, 1000])
def test_the_context_ends_an_answer(open_llm: OpenLLM, wanted: int | None) -> None:
    llm = open_llm(max_model_len=40)
    output = llm.generate(list(range(10, 40)), params(wanted))
    assert len(output.token_ids) == 10
    assert output.finish_reason == "length"
    assert len(llm.generate(list(range(10, 49)), params(wanted)).token_ids) == 1


def test_the_end_token_ends_an_answer(open_llm: OpenLLM, alone: list[RequestOutput]) -> None:
    llm = open_llm()
    tokens = alone[0].token_ids
    last = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    object.__setattr__(inside(llm).loaded, "eos_token_ids", frozenset({tokens[last]}))
    output = llm.generate(_PROMPTS[0], SamplingParams(max_tokens=12))
    assert output.finish_reason == "stop"
    assert output.token_ids == tokens[: last + 1]
    assert output.text == llm.tokenizer.decode(tokens[:last], skip_special_tokens=True)
    going_on = llm.generate(_PROMPTS[0], params())
    assert going_on.token_ids == tokens
    assert going_on.finish_reason == "length"


def test_stop_strings_end_an_answer_and_are_not_shown(llm: KVShare) -> None:
    whole = llm.generate(_PROMPTS[2], params(60)).text
    starts = [i for i in range(5, len(whole) - 8) if "\ufffd" not in whole[i : i + 4]][::7]
    assert starts
    for start in starts:
        stop = whole[start : start + 4]
        chunks = list(llm.stream(_PROMPTS[2], params(60, stop=[stop, "never written"])))
        output = chunks[-1].output
        assert output is not None
        assert output.finish_reason == "stop"
        assert output.text == whole[: whole.index(stop)]
        assert "".join(c.text for c in chunks) == output.text
        assert len(output.token_ids) < 60


# -- answers in chunks, which add up to the text ---------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        params(40),
        params(40, temperature=1.0, seed=5),
        params(40, stop=["e", "zz"]),
        params(40, stop=("no such text is ever written",)),
        params(1),
    ],
    ids=["greedy", "sampled", "stop", "stop that never comes", "one token"],
)
def test_chunks_add_up_to_the_text(llm: KVShare, sampling: SamplingParams) -> None:
    options = RequestOptions(reuse="off")
    for prompt in _PROMPTS[:4]:
        chunks = list(llm.stream(prompt, sampling, options))
        assert [c.output is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
        output = chunks[-1].output
        assert output is not None
        assert "".join(c.text for c in chunks) == output.text
        assert output.text == llm.generate(prompt, sampling, options).text


def test_tokens_come_one_by_one(open_llm: OpenLLM) -> None:
    llm = open_llm()
    gate = Gate(inside(llm).runner, "decode")
    stream = llm.stream(_PROMPTS[0], params(5))
    first = next(stream)  # the prefill's token is there before anything is decoded
    assert len(first.token_ids) == 1
    assert first.output is None
    gate.open()
    rest = list(stream)
    output = rest[-1].output
    assert output is not None
    assert len(output.token_ids) == 5


# -- seeds that repeat an answer, and log-probabilities that are those of the model ----------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
        {"frequency_penalty": 1.5, "response_format": json_schema(SCHEMAS["bounds"])},
    ],
    ids=["plain", "penalties", "form"],
)
def test_a_seed_repeats_an_answer_in_any_company(llm: KVShare, fields: dict[str, Any]) -> None:
    options = RequestOptions(reuse="off")
    seeded = params(20, temperature=1.0, seed=11, **fields)
    one = llm.generate(_PROMPTS[0], seeded, options)
    company = [Inbox(llm, p, params(20, temperature=1.0)) for p in _PROMPTS[1:4]]
    again = llm.generate(_PROMPTS[0], seeded, options)
    other = llm.generate(_PROMPTS[0], replace(seeded, seed=12), options)
    assert one.token_ids == again.token_ids
    assert one.token_ids != other.token_ids
    assert all(len(inbox.result().token_ids) == 20 for inbox in company)


def test_logprobs(llm: KVShare, alone: list[RequestOutput], tiny_folder: Path) -> None:
    chunks = list(llm.stream(_PROMPTS[0], params(logprobs=5), RequestOptions(reuse="off")))
    output = chunks[-1].output
    assert output is not None
    told = tuple(x for chunk in chunks for x in chunk.logprobs)
    assert [len(chunk.logprobs) for chunk in chunks] == [len(chunk.token_ids) for chunk in chunks]
    assert output.token_ids == alone[0].token_ids
    assert alone[0].logprobs is None
    assert output.logprobs is not None
    # A last token that adds no text comes with the output only.
    assert told and told == output.logprobs[: len(told)]
    assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
    for entry in output.logprobs:
        assert len(entry.top) == 5
        assert entry.top[0] == (entry.token_id, entry.logprob)  # greedy
        assert all(a[1] >= b[1] for a, b in itertools.pairwise(entry.top))
        assert entry.logprob <= 0
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids[:-1]]])
    with torch.inference_mode():
        expected = model(ids).logits[0, len(output.prompt_token_ids) - 1 :].log_softmax(-1)
    for entry, row in zip(output.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)


# -- what is told of a request: its times, where its KV came from, the counters --------------------


def test_metrics_are_sane(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=2)
    outputs = llm.generate([*_PROMPTS, _DONOR], params(5))
    llm.flush()
    outputs.append(llm.generate(_TARGET, params(5)))
    for output in outputs:
        m = output.metrics
        parts = (m.queue, m.lookup, m.plan, m.edit, m.prefill)
        assert all(part >= 0 for part in (*parts, *m.token_times))
        assert m.prefill > 0
        assert sum(parts) <= m.ttft <= m.total
        assert len(m.token_times) == len(output.token_ids) - 1
        assert m.ttft + sum(m.token_times) <= m.total + 1e-6
    assert outputs[-1].metrics.lookup > 0
    assert outputs[-1].metrics.edit > 0
    assert outputs[-1].to_dict()["metrics"]["total"] == outputs[-1].metrics.total


def test_counters_follow_provenance(open_llm: OpenLLM) -> None:
    llm = open_llm()
    outputs = []
    for prompt in (_DONOR, _TARGET, _DONOR):
        outputs.append(llm.generate(prompt, params(3)))
        llm.flush()
    counts = outcomes(llm)
    assert counts["requests"] == 3
    assert counts["generation_tokens"] == 9
    assert counts["prompt_tokens"] == sum(len(o.prompt_token_ids) for o in outputs)
    for kind in ("exact", "reused", "recomputed"):
        expected = sum(getattr(o.provenance, kind) for o in outputs)
        assert counts[f"prompt_tokens_{kind}"] == expected
    assert llm.stats()["donors"]["events"]["save_known"] == 1
