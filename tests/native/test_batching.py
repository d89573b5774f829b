"""Many requests over few slots answer as one by one, and in the order they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm import RequestOptions, RequestOutput
from kvshare_mm.native.slots import Chunk

from .. import references
from .asking import _PROMPTS, Inbox, OpenLLM, inside, outcomes, params


def test_greedy_answers_are_those_of_transformers(
    alone: list[RequestOutput], tiny_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for output in alone[:3]:
        prompt = references.text(output.prompt_token_ids)
        assert list(output.token_ids) == references.greedy(model, prompt, 12)


@pytest.mark.parametrize("reuse", ["off", "exact"])
def test_eight_requests_over_two_slots_answer_as_one_by_one(
    open_llm: OpenLLM, alone: list[RequestOutput], reuse: Any
) -> None:
    llm = open_llm(max_num_seqs=2, drafts=False)
    widths: list[int] = []
    decode = inside(llm).runner.decode

    def recorded(slots: Any, *rest: Any) -> torch.Tensor:
        widths.append(len(slots))
        assert len(set(slots)) == len(slots)
        return decode(slots, *rest)

    step = inside(llm).runner.step

    def stepped(chunk: Chunk, slots: Any, *rest: Any) -> torch.Tensor:
        widths.append(len(slots))
        assert chunk.slot not in slots
        return step(chunk, slots, *rest)

    inside(llm).runner.decode, inside(llm).runner.step = recorded, stepped
    outputs = llm.generate(_PROMPTS, params(), RequestOptions(reuse=reuse))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
    assert [o.text for o in outputs] == [o.text for o in alone]
    assert max(widths) == 2
    assert sum(widths) == 8 * 11  # the first token of each comes from its prefill
    assert outcomes(llm)["finished_length"] == 8


def test_requests_of_different_lengths_make_room_for_each_other(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=2)
    inboxes = [Inbox(llm, p, params(n)) for p, n in zip(_PROMPTS, range(1, 9), strict=True)]
    for n, inbox, whole in zip(range(1, 9), inboxes, alone, strict=True):
        assert inbox.result().token_ids == whole.token_ids[:n]
