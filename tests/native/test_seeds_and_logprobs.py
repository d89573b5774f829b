"""Seeds that repeat an answer, and log-probabilities that are those of the model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm import KVShare, RequestOptions, RequestOutput

from .asking import _PROMPTS, Inbox, params
from .schemas import SCHEMAS, json_schema


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
