"""Many requests over few slots answer as one by one, and in the order they came."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm import KVShare, RequestOptions, RequestOutput

from .asking import _PROMPTS, PATIENCE_S, Inbox, OpenLLM, inside, outcomes, params


def test_greedy_answers_are_those_of_transformers(
    alone: list[RequestOutput], tiny_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for output in alone[:3]:
        ids = torch.tensor([output.prompt_token_ids])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output.token_ids == tuple(whole[0, ids.shape[1] :].tolist())


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

    inside(llm).runner.decode = recorded
    outputs = llm.generate(_PROMPTS, params(), RequestOptions(reuse=reuse))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
    assert [o.text for o in outputs] == [o.text for o in alone]
    assert max(widths) == 2
    assert sum(widths) == 8 * 11  # the first token of each comes from its prefill
    assert outcomes(llm)["finished_length"] == 8


def test_requests_from_many_threads(llm: KVShare, alone: list[RequestOutput]) -> None:
    found: dict[int, RequestOutput] = {}

    def ask(i: int) -> None:
        found[i] = llm.generate(_PROMPTS[i], params(), RequestOptions(reuse="off"))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [found[i].token_ids for i in range(8)] == [o.token_ids for o in alone]
    assert len({o.request_id for o in found.values()}) == 8


def test_requests_from_many_tasks(llm: KVShare, alone: list[RequestOutput]) -> None:
    async def ask_all() -> list[RequestOutput]:
        options = RequestOptions(reuse="off")
        return await asyncio.gather(*(llm.agenerate(p, params(), options) for p in _PROMPTS))

    assert [o.token_ids for o in asyncio.run(ask_all())] == [o.token_ids for o in alone]


def test_requests_of_different_lengths_make_room_for_each_other(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=2)
    inboxes = [Inbox(llm, p, params(n)) for p, n in zip(_PROMPTS, range(1, 9), strict=True)]
    for n, inbox, whole in zip(range(1, 9), inboxes, alone, strict=True):
        assert inbox.result().token_ids == whole.token_ids[:n]


def test_waiting_requests_are_admitted_in_the_order_they_came(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    order: list[tuple[int, ...]] = []
    prefill = inside(llm).runner.prefill

    def recorded(slot: int, token_ids: Any, *rest: Any) -> torch.Tensor:
        order.append(tuple(token_ids.tolist()))
        return prefill(slot, token_ids, *rest)

    inside(llm).runner.prefill = recorded
    inboxes = [Inbox(llm, p, params(3)) for p in _PROMPTS]
    assert [inbox.result().prompt_token_ids for inbox in inboxes] == order
