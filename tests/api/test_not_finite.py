"""A model that once puts out what is no number: its request fails, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kvshare_mm import KVShare, ModelOutputError, RequestOptions, SamplingParams
from kvshare_mm.native.slots import SlotRunner

from .prompts import events

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
DRAWN = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=1)
ALONE = RequestOptions(reuse="off", store=False)
# The tail and the fronts alone: how much of a picture is repaired is not what is tested here.
REUSING = RequestOptions(repair="window:2")


def about(question: str, colour: str = "red") -> list[dict[str, Any]]:
    photo = {"type": "image", "image": Image.new("RGB", (112, 112), colour)}
    desk = "You answer for a shop that sells kettles, lamps and clocks in many colours. " * 3
    return [
        {"role": "system", "content": desk},
        {"role": "user", "content": [photo, {"type": "text", "text": question}]},
    ]


FIRST, NEXT = about("What is in the picture?"), about("Which colour does it have?")


@pytest.fixture
def open_seeing(tmp_path: Path) -> Iterator[Callable[[], KVShare]]:
    opened: list[KVShare] = []

    def open_one() -> KVShare:
        llm = KVShare("tiny-vl", embedder=None, max_num_seqs=2, store_dir=tmp_path)
        opened.append(llm)
        return llm

    yield open_one
    for llm in opened:
        llm.close()


@contextmanager
def broken_model(monkeypatch: pytest.MonkeyPatch, *, logits: bool = True) -> Iterator[None]:
    """What is computed gets K and V of NaN from the second layer on, and such logits if asked."""
    forward = SlotRunner._forward

    def spoil(
        self: Any, slot: int, ids: Any, index: torch.Tensor, *rest: Any, **recorders: Any
    ) -> Any:
        out = forward(self, slot, ids, index, *rest, **recorders)
        for tensor in self.slot_kv(slot):
            tensor[1:, :, index] = float("nan")
        if logits:
            out.logits[:] = float("nan")
        return out

    with monkeypatch.context() as patch:
        patch.setattr(SlotRunner, "_forward", spoil)
        yield


def donors(llm: KVShare) -> int:
    llm.flush()
    count: int = llm.stats()["donors"]["nodes"]
    return count


def assert_as_alone(llm: KVShare, messages: list[dict[str, Any]]) -> None:
    alone = llm.chat(messages, GREEDY, ALONE)
    output = llm.chat(messages, GREEDY, REUSING)
    assert output.token_ids == alone.token_ids
    assert output.logprobs is not None and alone.logprobs is not None
    for got, want in zip(output.logprobs, alone.logprobs, strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=0.05)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_request_of_no_numbers_fails_and_nothing_of_it_stays(
    open_seeing: Callable[[], KVShare], monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    llm = open_seeing()
    with broken_model(monkeypatch), pytest.raises(ModelOutputError, match="not a number"):
        llm.chat(FIRST, params)
    assert donors(llm) == 0
    assert llm.stats()["requests"]["failed"] == 1
    assert_as_alone(llm, NEXT)
    assert_as_alone(llm, FIRST)
    llm.close()

    llm = open_seeing()
    assert donors(llm) == events(llm)["restored"] == 2
    assert_as_alone(llm, about("How many are there?"))
    assert_as_alone(llm, FIRST)


def test_kv_of_no_numbers_is_not_taken_up_from_an_answer_that_is_fine(
    open_seeing: Callable[[], KVShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_seeing()
    with broken_model(monkeypatch, logits=False):
        llm.chat(FIRST, SamplingParams(max_tokens=1))
        assert donors(llm) == 0
    assert events(llm)["not_finite"] == 1
    assert events(llm)["save_failed"] == 1
    assert_as_alone(llm, NEXT)
    llm.close()

    llm = open_seeing()
    assert events(llm) == {"restored": 1}
    assert_as_alone(llm, FIRST)


def test_features_of_no_numbers_are_not_kept(
    open_seeing: Callable[[], KVShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_seeing()
    family = llm._parts.loaded.family
    assert family is not None
    encode = family.encode

    def spoil(*args: Any) -> torch.Tensor:
        return torch.full_like(encode(*args), float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(family, "encode", spoil)
        with pytest.raises(ModelOutputError):
            llm.chat(FIRST, GREEDY)
    assert llm.stats()["media"]["store_error"] == 1
    assert donors(llm) == 0
    assert llm.stats()["donors"]["bytes"] == {"host": 0, "disk": 0}
    assert_as_alone(llm, FIRST)
