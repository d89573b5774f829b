"""Donors: saved behind the answer, once, and found by meaning in time."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from kvshare_mm import RequestOptions, RequestOutput, StreamChunk
from kvshare_mm.native.waiting import WaitingRequests

from ..helpers import until
from .asking import (
    _DONOR,
    _PROMPTS,
    _TARGET,
    PATIENCE_S,
    Gate,
    Inbox,
    OpenLLM,
    inside,
    outcomes,
    params,
)


def test_donors_are_saved_behind_the_answer(open_llm: OpenLLM, alone: list[RequestOutput]) -> None:
    llm = open_llm(max_num_seqs=2)
    gate = Gate(inside(llm).donors, "save")
    llm.generate(_DONOR, params(2))
    gate.wait()
    assert llm.stats()["donors"]["nodes"] == 0
    assert not llm.flush(0.01)
    # The other slot serves meanwhile: other namespaces, and those who share with nobody.
    for options in RequestOptions(cache_salt="b", store=False), RequestOptions(reuse="off"):
        assert llm.generate(_PROMPTS[0], params(), options).token_ids == alone[0].token_ids
    gate.open()
    assert llm.flush()
    assert llm.stats()["donors"]["nodes"] == 1
    assert llm.generate(_TARGET, params(2)).provenance.reused > 0


def test_what_was_flushed_outlives_a_kill_though_its_owner_is_still_answered(
    open_llm: OpenLLM, tmp_path: Path
) -> None:
    exact = RequestOptions(reuse="exact")
    asked = f"{_DONOR} And what is value 4?"
    llm = open_llm(max_num_seqs=2, store_dir=tmp_path / "ours")
    owner = llm.stream(_DONOR, params(300))
    next(owner)
    assert llm.generate(asked, params(2), exact).provenance.exact > 0
    assert llm.flush()
    shutil.copytree(tmp_path / "ours", tmp_path / "left")  # all that a kill leaves
    owner.close()
    llm.close()
    again = open_llm(store_dir=tmp_path / "left")
    assert again.generate(asked, params(2), exact).provenance.recomputed == 1


def test_what_is_asked_after_an_answer_finds_it(open_llm: OpenLLM) -> None:
    """Though it is saved behind the answer, and however long that takes."""
    llm = open_llm(max_num_seqs=2)
    donors = inside(llm).donors
    save = donors.save

    def slowly(*args: Any) -> str | None:
        time.sleep(0.05)
        return save(*args)

    donors.save = slowly
    llm.generate(_DONOR, params(2))
    assert llm.generate(_TARGET, params(2)).provenance.reused > 0
    exact = RequestOptions(reuse="exact")
    prompt, known = llm.tokenize(_PROMPTS[3]), 0
    for turn in range(6):
        output = llm.generate(list(prompt), params(4), exact)
        assert turn == 0 or output.provenance.exact == known
        # The KV of the last token of an answer is not computed any more.
        known = len(prompt) + 3
        prompt = (*prompt, *output.token_ids, *llm.tokenize(" and what then?"))


def test_what_was_asked_before_the_answer_does_not_wait_for_it(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WaitingRequests, "MAX_HOLD_S", 0.05)
    llm = open_llm(max_num_seqs=2)
    gate = Gate(inside(llm).donors, "save")
    decoding = Gate(inside(llm).runner, "decode")
    first = Inbox(llm, _DONOR, params(2))
    decoding.wait()
    second = Inbox(llm, _TARGET, params(2))
    decoding.open()
    first.result()
    gate.wait()
    assert second.result().provenance.declined == "no_donor"
    gate.open()


def test_nobody_waits_for_a_save_for_ever(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WaitingRequests, "MAX_HOLD_S", 0.05)
    llm = open_llm(max_num_seqs=2)
    gate = Gate(inside(llm).donors, "save")
    llm.generate(_DONOR, params(2))
    gate.wait()
    output = llm.generate(_TARGET, params(2), RequestOptions(store=False))
    assert output.provenance.declined == "no_donor"
    gate.open()


def test_a_flush_waits_for_every_answer_that_was_delivered(open_llm: OpenLLM) -> None:
    llm = open_llm()
    engine = inside(llm).engine
    # Of the answer: it could be done before the answer is told.
    saving = Gate(inside(llm).prefiller, "save", lambda *args: bool(args[-1]))
    flushed_in_sink: list[bool] = []
    done = threading.Event()

    def sink(chunk: StreamChunk | Exception) -> None:
        if isinstance(chunk, StreamChunk) and chunk.output is not None:
            flushed_in_sink.append(engine.wait_saved(0))
            done.set()

    engine.submit(llm.read(_DONOR, params(2), None), sink)
    assert done.wait(PATIENCE_S)
    assert flushed_in_sink == [False]
    saving.open()
    assert llm.flush()
    assert llm.stats()["donors"]["nodes"] == 1


def test_a_save_that_fails_is_counted_and_frees_its_slot(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)

    inside(llm).donors.save = Mock(side_effect=RuntimeError("no memory for a copy"))
    for _ in range(3):
        assert len(llm.generate(_DONOR, params(2)).token_ids) == 2
    assert llm.flush()
    assert outcomes(llm)["save_failed"] == 3
    assert llm.stats()["donors"]["nodes"] == 0


def test_a_prompt_is_a_donor_while_it_is_answered(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=2)
    chunks = llm.stream(_DONOR, params(60))
    next(chunks)
    reused = llm.generate(_TARGET, params(2)).provenance
    assert reused.reused > 0
    [*_, last] = chunks
    assert last.output is not None
    assert llm.flush()
    assert llm.stats()["donors"]["nodes"] == 2
    # What was stored first goes on as its answer did: one node, exact to its end.
    again = [*last.output.prompt_token_ids, *last.output.token_ids]
    assert llm.generate(again, params(1)).provenance.exact == len(again) - 1


def test_a_prompt_stays_a_donor_when_its_answer_is_cancelled(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=2)
    chunks = llm.stream(_DONOR, params(60))
    next(chunks)
    chunks.close()
    assert llm.flush()
    assert llm.generate(_DONOR, params(1)).provenance.recomputed == 1


def test_only_what_is_alike_waits_for_a_prompt_that_is_being_stored(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=3)
    prefill, save = Gate(inside(llm).runner, "prefill"), Gate(inside(llm).donors, "save")
    first = Inbox(llm, _DONOR, params(8))
    prefill.wait()
    alike, unlike = Inbox(llm, _TARGET, params(2)), Inbox(llm, _PROMPTS[6], params(2))
    prefill.open()
    save.wait()
    assert unlike.result().provenance.reused == 0
    save.open()
    assert alike.result().provenance.reused > 0
    assert len(first.result().token_ids) == 8


def test_a_donor_that_goes_while_it_is_answered_is_stored_anew(open_llm: OpenLLM) -> None:
    llm = open_llm()
    answering = Gate(inside(llm).runner, "decode")
    chunks = llm.stream(_DONOR, params(60))
    next(chunks)
    donors = inside(llm).donors
    until(lambda: len(donors.nodes()) == 1)
    donors.delete(donors.nodes()[0].node_id)
    answering.open()
    list(chunks)
    assert llm.flush()
    assert len(donors.nodes()) == 1
    assert "save_failed" not in outcomes(llm)


def test_requests_that_come_together_find_each_other(open_llm: OpenLLM) -> None:
    """All but the first of a burst are alike to one that was computed before them."""
    llm = open_llm(max_num_seqs=4)
    prompts = [_TARGET.replace("77", str(number)) for number in range(20, 32)]
    outputs = llm.generate(prompts, params(20))
    assert [o.provenance.reused > 0 for o in outputs].count(False) == 1


def test_donors_found_by_meaning_are_used_if_they_come_in_time(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    donors = inside(llm).donors
    similar = donors.reuse.similar = Mock(return_value=("nobody-knows-it",))
    find = donors.reuse.find = Mock(wraps=donors.reuse.find)
    gate = Gate(inside(llm).runner, "decode")
    first = Inbox(llm, _PROMPTS[0], params(2))
    gate.wait()
    second = Inbox(llm, _PROMPTS[1], params(2))
    until(lambda: bool(next(iter(inside(llm).engine._waiting)).similar))
    gate.open()
    first.result()
    second.result()
    # The first did not wait: it was not held up by a search.
    assert [call.args[0] for call in similar.call_args_list] == [_PROMPTS[1]]
    assert [call.args[-1] for call in find.call_args_list] == [(), ("nobody-knows-it",)]
