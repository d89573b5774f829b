"""Several tokens a step: whatever is drafted, the answer is the one that it was without drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm import KVShare, RequestOptions, RequestOutput
from kvshare_mm.native.acceptance import Acceptance
from kvshare_mm.native.drafts import Drafter

from ..helpers import until
from .asking import _DONOR, _PROMPTS, _TARGET, Inbox, OpenLLM, inside, outcomes, params
from .schemas import an_object, json_schema

_OFF = RequestOptions(reuse="off", store=False)
Draft = Callable[[list[int], int], list[int]]


# -- what is drafted ----------------------------------------------------------------------------


def drafter(prompt: Sequence[int], answer: Sequence[int] = ()) -> Drafter:
    return Drafter(np.array(prompt, np.int64), np.array(answer, np.int64))


def test_a_donors_answer_goes_on_where_it_was_left() -> None:
    one = drafter(range(20), range(50, 70))
    assert one.draft(9) == [50, 51, 52, 53, 54, 55, 56, 57]
    one.add([50, 51, 52])
    assert one.draft(2) == [53, 54]
    one.add([99])  # another token: until three agree nothing is known
    assert one.draft(8) == []
    one.add([55])
    one.add([56])
    assert one.draft(8) == []
    one.add([57])
    assert one.draft(8) == [58, 59, 60]  # some have been wrong, and more rows are dearer


def test_without_a_donor_what_the_prompt_says_is_drafted() -> None:
    one = drafter([1, 2, 3, 4, 5, 6, 9, 2, 3])
    assert one.draft(8) == [4, 5]
    one.add([4, 7])
    assert one.draft(8) == []


def test_of_several_places_the_nearest_counts() -> None:
    answer = [7, 1, 2, 3, 40, 8, 1, 2, 3, 50, 9]
    one = drafter(range(20, 30), answer)
    one.add(answer[:9])
    assert one.draft(1) == [50]


def test_what_brings_nothing_is_not_tried_at_every_token() -> None:
    rng = np.random.default_rng(0)
    one = drafter([1, 2, *range(10, 40)] * 4)
    tried = 0
    for _ in range(100):
        one.add([1, 2])  # behind which something else comes than before, always
        tried += bool(one.draft(8))
        one.add([int(rng.integers(100, 1000))])
    assert 5 < tried < 20


def test_an_answer_that_ends_within_a_draft_says_nothing_against_it() -> None:
    known = Acceptance()
    for _ in range(40):
        one = Drafter(np.arange(20), np.arange(50, 70), known)
        assert one.draft(2)
        one.add([50])  # the whole answer
    assert known.length("donor", 8) == 8


def test_long_answers_are_remembered() -> None:
    one = drafter([1])
    one.add(list(range(100, 400)))
    one.add([150, 151])
    assert one.draft(4) == [152, 153]


def test_nothing_is_drafted_of_nothing() -> None:
    assert drafter([5]).draft(8) == []
    assert drafter([5, 5, 5]).draft(0) == []
    assert drafter(range(9), [3]).draft(8) == [3]


# -- and what becomes of it ---------------------------------------------------------------------


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Draft], None]:
    """Has everybody draft what a function of the answer so far and the most that may be says."""

    def use(draft: Draft) -> None:
        def add(self: Drafter, tokens: Sequence[int]) -> None:
            vars(self).setdefault("said", []).extend(tokens)

        monkeypatch.setattr(Drafter, "add", add)
        monkeypatch.setattr(Drafter, "draft", lambda self, most, _: draft(vars(self)["said"], most))

    return use


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.3, "seed": 5},
    "logprobs": {"logprobs": 3},
    "stop": {"stop": "value"},
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    "form": {"response_format": json_schema(an_object(a={"type": "integer"}))},
    "unique items": {
        "temperature": 1.0, "seed": 5,
        "response_format": json_schema({"type": "array", "uniqueItems": True, "minItems": 8,
                                        "items": {"enum": [*range(9)]}}),
    },
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("right", [0, 1, 3, 8])
def test_answers_do_not_depend_on_drafts(
    open_llm: OpenLLM,
    drafted: Callable[[Draft], None],
    asked: dict[str, Any],
    right: int,
) -> None:
    """Drafts of which the first so many tokens are right, and the others are not."""
    plain, llm = open_llm(drafts=False), open_llm()
    want = [plain.generate(p, params(30, **asked), _OFF) for p in _PROMPTS[:3]]
    for expected, prompt in zip(want, _PROMPTS, strict=False):
        ids = list(expected.token_ids)

        def draft(said: list[int], most: int, ids: list[int] = ids) -> list[int]:
            known = ids[len(said) : len(said) + right]
            return [*known, *([3] * 8)][:most]

        drafted(draft)
        got = llm.generate(prompt, params(30, **asked), _OFF)
        assert got.token_ids == expected.token_ids
        assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
        for one, other in zip(got.logprobs or (), expected.logprobs or (), strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    if right and asked in ({}, {"logprobs": 3}):
        assert outcomes(llm)["draft_accepted"] > 3 * 29 * right // (right + 1) - 12


def test_right_drafts_save_steps_and_requests_at_once_share_them(
    open_llm: OpenLLM, alone: list[RequestOutput], drafted: Callable[[Draft], None]
) -> None:
    llm = open_llm(max_num_seqs=4)
    answers = {o.token_ids[0]: list(o.token_ids) for o in alone[:4]}
    asked = [i for i, o in enumerate(alone[:4]) if [*o.token_ids] in answers.values()]
    assert len(asked) >= 3
    drafted(lambda said, most: answers[said[0]][len(said) :][:most])
    steps: list[int] = []
    decode = inside(llm).runner.decode

    def counted(slots: Any, *rest: Any) -> torch.Tensor:
        steps.append(len(slots))
        return decode(slots, *rest)

    inside(llm).runner.decode = counted
    boxes = [Inbox(llm, _PROMPTS[i], params(), _OFF) for i in asked]
    assert [b.result().token_ids for b in boxes] == [alone[i].token_ids for i in asked]
    assert len(steps) < len(asked) * 11 / 2
    assert max(steps) <= 4 + 16


@pytest.mark.parametrize("drafts", [True, False])
def test_a_cancelled_answer_ends_with_its_next_token(
    open_llm: OpenLLM, alone: list[RequestOutput], drafted: Callable[[Draft], None], drafts: bool
) -> None:
    llm = open_llm(drafts=drafts)
    answer = list(alone[0].token_ids)
    drafted(lambda said, most: answer[len(said) :][:most])
    box = Inbox(llm, _PROMPTS[0], params(), _OFF, cancelled_after=3)
    output = box.result()
    assert output.finish_reason == "abort" and list(output.token_ids) == answer[:3]


def test_a_draft_is_right_up_to_the_answers_end(
    open_llm: OpenLLM, alone: list[RequestOutput], drafted: Callable[[Draft], None]
) -> None:
    llm, answer = open_llm(), list(alone[0].token_ids)
    said = "".join(chunk.text for chunk in [*llm.stream(_PROMPTS[0], params(), _OFF)][:6])
    before = outcomes(llm)
    drafted(lambda said, most: answer[len(said) :][:most])
    output = llm.generate(_PROMPTS[0], params(stop=said), _OFF)
    assert 2 < len(output.token_ids) < len(answer), "it ends within the first draft"
    right = before["draft_accepted"] + len(output.token_ids) - 1
    until(lambda: outcomes(llm)["draft_accepted"] == right)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_an_answer_ends_where_it_shall(
    open_llm: OpenLLM, drafted: Callable[[Draft], None], most: int
) -> None:
    """Drafts that go on beyond `max_tokens`, and beyond the context."""
    llm = open_llm(max_model_len=96)
    drafted(lambda said, room: [4] * room)
    assert len(llm.generate(_PROMPTS[1], params(most), _OFF).token_ids) == most
    output = llm.generate(_PROMPTS[1], params(None), _OFF)
    assert len(output.prompt_token_ids) + len(output.token_ids) == 96
    assert output.finish_reason == "length"


def test_a_request_like_another_is_answered_in_fewer_steps(open_llm: OpenLLM) -> None:
    llm, plain = open_llm(repair="none"), open_llm(repair="none", drafts=False)
    for server in (llm, plain):
        server.generate(_DONOR, params(40))
        assert server.flush()
    found = [server.generate(_TARGET, params(40)) for server in (llm, plain)]
    assert found[0].provenance.reused and found[0].token_ids == found[1].token_ids
    assert outcomes(llm)["draft_tokens"] >= outcomes(llm)["draft_accepted"] > 0
    assert outcomes(plain)["draft_tokens"] == 0
    until(lambda: outcomes(plain)["answer_forwards"] == outcomes(plain)["generation_tokens"] - 2)
    assert outcomes(llm)["answer_forwards"] < outcomes(plain)["answer_forwards"]


def test_what_was_drafted_wrongly_is_not_in_what_is_stored(
    open_llm: OpenLLM, drafted: Callable[[Draft], None]
) -> None:
    llm, plain = open_llm(), open_llm(drafts=False)
    drafted(lambda said, most: [3] * most)
    first = llm.generate(_DONOR, params(20))
    assert llm.flush()
    longer = _DONOR + first.text + " And what is value 4?"
    again = llm.generate(longer, params(20), RequestOptions(reuse="exact"))
    assert again.provenance.exact >= len(first.prompt_token_ids)
    assert again.token_ids == plain.generate(longer, params(20), _OFF).token_ids


def test_a_step_that_fails_is_tried_request_by_request_with_its_drafts(
    open_llm: OpenLLM, alone: list[RequestOutput], drafted: Callable[[Draft], None]
) -> None:
    llm = open_llm(max_num_seqs=2)
    answers = {o.token_ids[0]: list(o.token_ids) for o in alone[:2]}
    drafted(lambda said, most: answers[said[0]][len(said) :][: min(2, most)])
    decode = inside(llm).runner.decode

    def fail(slots: Any, *rest: Any) -> torch.Tensor:
        if len(set(slots)) > 1:
            raise RuntimeError("out of memory, or so")
        return decode(slots, *rest)

    inside(llm).runner.decode = fail
    boxes = [Inbox(llm, prompt, params(), _OFF) for prompt in _PROMPTS[:2]]
    assert [b.result().token_ids for b in boxes] == [o.token_ids for o in alone[:2]]


def test_models_without_partial_prefill_get_no_drafts(llm: KVShare) -> None:
    from kvshare_mm.native.plain import PlainRunner

    assert inside(llm).runner.can_draft
    assert not PlainRunner(inside(llm).loaded, 1).can_draft
