"""Answers in chunks, which add up to the text."""

from __future__ import annotations

import pytest

from kvshare_mm import KVShare, RequestOptions, SamplingParams

from .asking import _PROMPTS, Gate, OpenLLM, inside, params


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
