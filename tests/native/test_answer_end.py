"""When an answer ends: its length, the context, the end token, stop strings."""

from __future__ import annotations

import pytest

from kvshare_mm import KVShare, RequestOutput, SamplingParams

from .asking import _PROMPTS, OpenLLM, inside, params


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
