"""The engine's loop, on a tiny model: batching, streaming, cancelling, failing, closing."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from kvshare_mm import (
    EngineClosedError,
    KVShare,
    QueueFullError,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    StreamChunk,
)
from kvshare_mm.index.base import IndexUnavailableError

OpenLLM = Callable[..., KVShare]

PATIENCE_S = 20
_PROMPTS = [
    f"Laboratory report. Patient number {number}. {text}"
    for number, text in (
        (48210, "Haemoglobin 148 g/L, sodium 141 mmol/L. Question: what is the value?"),
        (7, "The quick brown fox jumps over the lazy dog."),
        (99120, "What is the value of sodium? Answer with the number."),
        (3, "Zebra, yak and gnu. " * 6),
        (51, "x"),
        (802, "Answer with nothing else. " * 3),
        (6, "brown brown brown " * 9),
        (1, "the dog, the fox, the number and the value: which is it?"),
    )
]
_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(12))
_HEAD = "Answer in one line: " + "g/L " * 12  # longer than a block of the prefix index
_DONOR = f"{_HEAD}Laboratory report. Patient number 48210. {_ROWS} Question: what is value 3?"
_TARGET = f"{_HEAD}Laboratory report. Patient number 77. {_ROWS} Question: what is value 3?"


def params(max_tokens: int | None = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **changes)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def idle(llm: KVShare) -> bool:
    return eventually(lambda: llm.stats()["queue"] == {"waiting": 0, "running": 0})


def outcomes(llm: KVShare) -> dict[str, int]:
    counts: dict[str, int] = llm.stats()["requests"]
    return counts


class Gate:
    """Holds up one method of a part of a server; lets everything through once opened."""

    def __init__(self, part: Any, name: str) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()
        real = getattr(part, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.entered.set()
            assert self._open.wait(PATIENCE_S)
            return real(*args, **kwargs)

        setattr(part, name, held)

    def wait(self) -> None:
        assert self.entered.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


class Inbox:
    """A sink, and the request submitted with it."""

    def __init__(self, llm: KVShare, prompt: str, sampling: SamplingParams) -> None:
        self.chunks: list[StreamChunk] = []
        self.error: Exception | None = None
        self._done = threading.Event()
        spec = llm._prompt(prompt, sampling, None)
        self.request_id = llm._parts.engine.submit(spec, self)

    def __call__(self, chunk: StreamChunk | Exception) -> None:
        if isinstance(chunk, Exception):
            self.error = chunk
            self._done.set()
        else:
            self.chunks.append(chunk)
            if chunk.output is not None:
                self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def result(self) -> RequestOutput:
        assert self._done.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        output = self.chunks[-1].output
        assert output is not None
        return output


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[KVShare]:
    """For tests that change nothing about the server; they take a salt of their own."""
    with KVShare(str(tiny_folder), embedder=None, max_num_seqs=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: KVShare) -> list[RequestOutput]:
    """The answers to `_PROMPTS`, each computed in full with nothing else running."""
    return [llm.generate(p, params(), RequestOptions(sharing="off")) for p in _PROMPTS]


# -- batching -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("sharing", ["off", "exact"])
def test_eight_requests_over_two_slots_answer_as_one_by_one(
    open_llm: OpenLLM, alone: list[RequestOutput], sharing: Any
) -> None:
    llm = open_llm(max_num_seqs=2)
    widths: list[int] = []
    decode = llm._parts.runner.decode

    def recorded(slots: Any, *rest: Any) -> torch.Tensor:
        widths.append(len(slots))
        assert len(set(slots)) == len(slots)
        return decode(slots, *rest)

    llm._parts.runner.decode = recorded  # type: ignore[method-assign]
    outputs = llm.generate(_PROMPTS, params(), RequestOptions(sharing=sharing))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
    assert [o.text for o in outputs] == [o.text for o in alone]
    assert max(widths) == 2
    assert sum(widths) == 8 * 11  # the first token of each comes from its prefill
    assert outcomes(llm)["finished_length"] == 8


def test_requests_from_many_threads(llm: KVShare, alone: list[RequestOutput]) -> None:
    found: dict[int, RequestOutput] = {}

    def ask(i: int) -> None:
        found[i] = llm.generate(_PROMPTS[i], params(), RequestOptions(sharing="off"))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [found[i].token_ids for i in range(8)] == [o.token_ids for o in alone]
    assert len({o.request_id for o in found.values()}) == 8


def test_requests_from_many_tasks(llm: KVShare, alone: list[RequestOutput]) -> None:
    async def ask_all() -> list[RequestOutput]:
        options = RequestOptions(sharing="off")
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
    prefill = llm._parts.runner.prefill

    def recorded(slot: int, token_ids: Any, *rest: Any) -> torch.Tensor:
        order.append(tuple(token_ids.tolist()))
        return prefill(slot, token_ids, *rest)

    llm._parts.runner.prefill = recorded  # type: ignore[method-assign]
    inboxes = [Inbox(llm, p, params(3)) for p in _PROMPTS]
    assert [inbox.result().prompt_token_ids for inbox in inboxes] == order


# -- streaming ----------------------------------------------------------------------------------


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
    options = RequestOptions(sharing="off")
    for prompt in _PROMPTS[:4]:
        chunks = list(llm.stream(prompt, sampling, options))
        assert [c.output is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
        output = chunks[-1].output
        assert output is not None
        assert "".join(c.text for c in chunks) == output.text
        assert output.text == llm.generate(prompt, sampling, options).text


def test_tokens_come_one_by_one(open_llm: OpenLLM) -> None:
    llm = open_llm()
    gate = Gate(llm._parts.runner, "decode")
    stream = llm.stream(_PROMPTS[0], params(5))
    first = next(stream)  # the prefill's token is there before anything is decoded
    assert len(first.token_ids) == 1
    assert first.output is None
    gate.open()
    rest = list(stream)
    output = rest[-1].output
    assert output is not None
    assert len(output.token_ids) == 5


def test_async_chunks_add_up_to_the_text(llm: KVShare) -> None:
    async def collect() -> list[StreamChunk]:
        return [c async for c in llm.astream(_PROMPTS[1], params(30))]

    chunks = asyncio.run(collect())
    output = chunks[-1].output
    assert output is not None
    assert "".join(c.text for c in chunks) == output.text


# -- cancelling ---------------------------------------------------------------------------------


def test_leaving_a_stream_frees_its_slot(open_llm: OpenLLM, alone: list[RequestOutput]) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")
    stream = llm.stream(_PROMPTS[0], params(400))
    next(stream)
    gate.wait()
    stream.close()  # type: ignore[attr-defined]
    gate.open()
    assert idle(llm)
    assert outcomes(llm)["finished_abort"] == 1
    assert outcomes(llm)["generation_tokens"] <= 2
    assert llm.generate(_PROMPTS[1], params()).token_ids == alone[1].token_ids


def test_breaking_out_of_a_for_loop_cancels(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")
    for chunk in llm.stream(_PROMPTS[0], params(400)):
        assert chunk.output is None
        break
    gate.open()
    assert idle(llm)
    assert outcomes(llm)["finished_abort"] == 1


def test_leaving_an_async_stream_frees_its_slot(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")

    async def leave() -> None:
        stream = llm.astream(_PROMPTS[0], params(400))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    gate.open()
    assert idle(llm)
    assert outcomes(llm)["finished_abort"] == 1


@pytest.mark.parametrize("call", ["agenerate", "achat"])
def test_cancelling_a_task_cancels_its_request(open_llm: OpenLLM, call: str) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")
    prompt: Any = _PROMPTS[0] if call == "agenerate" else [{"role": "user", "content": "Hello"}]

    async def cancelled() -> None:
        task = asyncio.create_task(getattr(llm, call)(prompt, params(400)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    gate.open()
    assert idle(llm)
    assert outcomes(llm)["finished_abort"] == 1
    assert outcomes(llm)["generation_tokens"] <= 2
    assert len(llm.generate(_PROMPTS[1], params(3)).token_ids) == 3


def test_a_request_cancelled_while_it_waits_is_never_computed(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")
    running = Inbox(llm, _PROMPTS[0], params())
    gate.wait()
    waiting = Inbox(llm, _PROMPTS[1], params())
    last = Inbox(llm, _PROMPTS[2], params())
    llm.cancel(waiting.request_id)
    gate.open()
    aborted = waiting.result()
    assert aborted.finish_reason == "abort"
    assert aborted.text == ""
    assert aborted.token_ids == ()
    assert aborted.provenance.spans == ()
    assert aborted.metrics.ttft == 0
    assert 0 <= aborted.metrics.queue <= aborted.metrics.total
    assert running.result().token_ids == alone[0].token_ids
    assert last.result().token_ids == alone[2].token_ids
    assert outcomes(llm)["requests"] == 2


def test_a_cancelled_request_keeps_the_text_it_has(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")
    inbox = Inbox(llm, _PROMPTS[0], params(400))
    gate.wait()
    llm.cancel(inbox.request_id)
    gate.open()
    output = inbox.result()
    assert output.finish_reason == "abort"
    assert 1 <= len(output.token_ids) <= 2
    assert "".join(c.text for c in inbox.chunks) == output.text


def test_cancelling_what_is_unknown_or_done_is_no_error(llm: KVShare) -> None:
    llm.cancel("nobody")
    llm.cancel(llm.generate(_PROMPTS[4], params(2)).request_id)
    assert len(llm.generate(_PROMPTS[4], params(2)).token_ids) == 2


# -- the bounded queue --------------------------------------------------------------------------


def test_a_full_queue_refuses_and_leaves_the_others_alone(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=1, max_queue=2)
    gate = Gate(llm._parts.runner, "decode")
    inboxes = [Inbox(llm, _PROMPTS[0], params())]
    gate.wait()
    inboxes += [Inbox(llm, p, params()) for p in _PROMPTS[1:3]]
    assert llm.stats()["queue"] == {"waiting": 2, "running": 1}
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        llm.generate(_PROMPTS[3], params())
    with pytest.raises(QueueFullError):
        next(llm.stream(_PROMPTS[3], params()))
    with pytest.raises(QueueFullError):
        asyncio.run(llm.agenerate(_PROMPTS[3], params()))
    assert outcomes(llm)["queue_full"] == 3
    gate.open()
    for inbox, whole in zip(inboxes, alone[:3], strict=True):
        assert inbox.result().token_ids == whole.token_ids
    assert len(llm.generate(_PROMPTS[3], params()).token_ids) == 12


def test_a_list_that_the_queue_cannot_take_leaves_nothing_running(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1, max_queue=2)
    gate = Gate(llm._parts.runner, "decode")
    with pytest.raises(QueueFullError):
        llm.generate(_PROMPTS, params(400))
    gate.open()
    assert idle(llm)
    assert "finished_length" not in outcomes(llm)
    assert outcomes(llm)["finished_abort"] >= 2


# -- closing ------------------------------------------------------------------------------------


def test_close_ends_what_is_in_flight_and_refuses_what_comes_later(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")
    running = Inbox(llm, _PROMPTS[0], params(400))
    gate.wait()
    waiting = Inbox(llm, _PROMPTS[1], params())
    closing = threading.Thread(target=llm.close)
    closing.start()
    assert eventually(lambda: llm._parts.engine._closing)
    with pytest.raises(EngineClosedError):
        llm.generate(_PROMPTS[2])
    gate.open()
    for inbox in (running, waiting):
        with pytest.raises(EngineClosedError, match="closed"):
            inbox.result()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    with pytest.raises(EngineClosedError):
        llm.generate(_PROMPTS[2])
    with pytest.raises(EngineClosedError):
        next(llm.stream(_PROMPTS[2]))
    with pytest.raises(EngineClosedError):
        asyncio.run(llm.achat([{"role": "user", "content": "Hello"}]))
    llm.close()


def test_close_reaches_the_callers(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm._parts.runner, "decode")
    errors: list[Exception] = []

    def ask() -> None:
        try:
            llm.generate(_PROMPTS[0], params(400))
        except EngineClosedError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    gate.wait()
    closing = threading.Thread(target=llm.close)
    closing.start()
    assert eventually(lambda: llm._parts.engine._closing)
    gate.open()
    asking.join(PATIENCE_S)
    closing.join(PATIENCE_S)
    assert len(errors) == 1


def test_close_captures_what_is_finished(open_llm: OpenLLM) -> None:
    llm = open_llm()
    assert llm._parts.donors is not None
    gate = Gate(llm._parts.donors, "capture")
    llm.generate(_DONOR, params(2))
    gate.wait()
    closing = threading.Thread(target=llm.close)
    closing.start()
    gate.open()
    closing.join(PATIENCE_S)
    assert llm.stats()["donors"]["nodes"] == 1


# -- failing ------------------------------------------------------------------------------------


def test_a_prefill_that_raises_fails_alone(open_llm: OpenLLM, alone: list[RequestOutput]) -> None:
    llm = open_llm(max_num_seqs=2)
    prefill = llm._parts.runner.prefill
    bad = len(alone[3].prompt_token_ids)

    def prefill_or_raise(slot: int, token_ids: Any, *rest: Any) -> torch.Tensor:
        if len(token_ids) == bad:
            raise RuntimeError("out of memory, or so")
        return prefill(slot, token_ids, *rest)

    llm._parts.runner.prefill = prefill_or_raise  # type: ignore[method-assign]
    inboxes = [Inbox(llm, p, params()) for p in _PROMPTS]
    for i, inbox in enumerate(inboxes):
        if i == 3:
            with pytest.raises(RuntimeError, match="out of memory"):
                inbox.result()
        else:
            assert inbox.result().token_ids == alone[i].token_ids
    for _ in range(3):  # more than there are slots: none may be lost
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.generate(_PROMPTS[3], params())
    assert outcomes(llm)["failed"] == 4
    assert llm.generate(_PROMPTS[0], params()).token_ids == alone[0].token_ids


def test_logits_that_are_no_numbers_fail_their_request_alone(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    decode = llm._parts.runner.decode

    def broken(*args: Any) -> torch.Tensor:
        return torch.full_like(decode(*args), float("nan"))

    llm._parts.runner.decode = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        llm.generate(_PROMPTS[0], params(temperature=1.0))
    llm._parts.runner.decode = decode  # type: ignore[method-assign]
    assert len(llm.generate(_PROMPTS[0], params()).token_ids) == 12
    assert outcomes(llm)["failed"] == 1


def test_a_sink_that_raises_ends_its_request_only(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=2)

    def broken(chunk: StreamChunk | Exception) -> None:
        raise ConnectionError("the client is gone")

    llm._parts.engine.submit(llm._prompt(_PROMPTS[0], params(400), None), broken)
    assert llm.generate(_PROMPTS[1], params()).token_ids == alone[1].token_ids
    assert idle(llm)
    assert outcomes(llm)["finished_abort"] == 1


def test_nobody_waits_for_an_engine_that_died(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("the device is lost")

    llm._parts.runner.decode = broken  # type: ignore[method-assign]
    gate = Gate(llm._parts.runner, "decode")
    inboxes = [Inbox(llm, p, params()) for p in _PROMPTS[:3]]
    gate.open()
    for inbox in inboxes:
        with pytest.raises(EngineClosedError, match="the device is lost"):
            inbox.result()
    with pytest.raises(EngineClosedError):
        llm.generate(_PROMPTS[0])
    assert llm.stats()["queue"] == {"waiting": 0, "running": 0}


def test_even_a_request_between_queue_and_slot_hears_of_the_engines_death(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(max_num_seqs=1)

    def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(llm._parts.engine, "_count", broken)
    with pytest.raises(EngineClosedError, match="a bug"):
        llm.generate(_PROMPTS[0])


# -- when an answer ends ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
def test_max_tokens(llm: KVShare, alone: list[RequestOutput], n: int) -> None:
    output = llm.generate(_PROMPTS[0], params(n))
    assert output.token_ids == alone[0].token_ids[:n]
    assert output.finish_reason == "length"


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
    object.__setattr__(llm._parts.loaded, "eos_token_ids", frozenset({tokens[last]}))
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


def test_the_earliest_stop_string_wins(llm: KVShare) -> None:
    whole = llm.generate(_PROMPTS[1], params(60)).text
    late, early = whole[20:23], whole[8:11]
    output = llm.generate(_PROMPTS[1], params(60, stop=(late, early)))
    assert output.text == whole[: min(whole.index(late), whole.index(early))]


# -- sampling -----------------------------------------------------------------------------------


def test_a_seed_repeats_an_answer_in_any_company(llm: KVShare) -> None:
    options = RequestOptions(sharing="off")
    seeded = params(20, temperature=1.0, seed=11)
    one = llm.generate(_PROMPTS[0], seeded, options)
    company = [Inbox(llm, p, params(20, temperature=1.0)) for p in _PROMPTS[1:4]]
    again = llm.generate(_PROMPTS[0], seeded, options)
    other = llm.generate(_PROMPTS[0], params(20, temperature=1.0, seed=12), options)
    assert one.token_ids == again.token_ids
    assert one.token_ids != other.token_ids
    assert all(len(inbox.result().token_ids) == 20 for inbox in company)


def test_without_a_seed_answers_differ(llm: KVShare) -> None:
    answers = {llm.generate(_PROMPTS[0], params(20, temperature=1.5)).token_ids for _ in range(3)}
    assert len(answers) > 1


def test_logprobs(llm: KVShare, alone: list[RequestOutput], tiny_folder: Path) -> None:
    output = llm.generate(_PROMPTS[0], params(logprobs=5), RequestOptions(sharing="off"))
    assert output.token_ids == alone[0].token_ids
    assert alone[0].logprobs is None
    assert output.logprobs is not None
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


def test_logprobs_of_the_chosen_token_only(llm: KVShare) -> None:
    output = llm.generate(_PROMPTS[0], params(4, logprobs=0, temperature=1.0, seed=1))
    assert output.logprobs is not None
    assert [(e.token_id, e.top) for e in output.logprobs] == [(t, ()) for t in output.token_ids]


# -- what is told of a request ------------------------------------------------------------------


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


def check_provenance(output: RequestOutput) -> None:
    p = output.provenance
    n = len(output.prompt_token_ids)
    assert p.exact + p.reused + p.recomputed == n
    assert [s.start for s in p.spans] == [0, *(s.end for s in p.spans[:-1])]
    assert p.spans[-1].end == n
    assert p.spans[-1].kind == "recomputed"
    for kind in ("exact", "reused", "recomputed"):
        assert sum(s.end - s.start for s in p.spans if s.kind == kind) == getattr(p, kind)
    assert {s.donor for s in p.spans if s.kind != "recomputed"} <= set(p.donors)
    assert all(s.donor is None for s in p.spans if s.kind == "recomputed")
    assert 0 <= p.similarity <= 1
    assert p.fallback is None


def test_provenance_adds_up(llm: KVShare) -> None:
    # A random model looks everywhere alike, so the default policy would repair most of it.
    options = RequestOptions(cache_salt="provenance", repair="window:2")
    first = llm.generate(_DONOR, params(3), options)
    llm.flush()
    similar = llm.generate(_TARGET, params(3), options)
    llm.flush()
    again = llm.generate(_TARGET, params(3), options)
    same = llm.generate(_DONOR, params(3), options)
    for output in (first, similar, again, same):
        check_provenance(output)
    n = len(first.prompt_token_ids)
    assert (first.provenance.recomputed, first.provenance.declined) == (n, "no_donor")
    assert first.provenance.donors == ()
    assert similar.provenance.exact > 0
    assert similar.provenance.reused > n // 3
    assert len(similar.provenance.donors) == 1
    assert (same.provenance.exact, same.provenance.recomputed) == (n - 1, 1)
    assert same.token_ids == first.token_ids
    assert similar.provenance.donors == same.provenance.donors


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
    for counter, kind in (("exact", "exact"), ("reused", "reused"), ("computed", "recomputed")):
        expected = sum(getattr(o.provenance, kind) for o in outputs)
        assert counts[f"prompt_tokens_{counter}"] == expected


# -- donors -------------------------------------------------------------------------------------


def test_donors_are_captured_behind_the_answer(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=2)
    assert llm._parts.donors is not None
    gate = Gate(llm._parts.donors, "capture")
    llm.generate(_DONOR, params(2))
    gate.wait()
    assert llm.stats()["donors"]["nodes"] == 0
    assert not llm.flush(0.01)
    # The other slot serves meanwhile.
    options = RequestOptions(store=False)
    assert llm.generate(_PROMPTS[0], params(), options).token_ids == alone[0].token_ids
    gate.open()
    assert llm.flush()
    assert llm.stats()["donors"]["nodes"] == 1
    assert llm.generate(_TARGET, params(2)).provenance.reused > 0


def test_a_flush_waits_for_every_answer_that_was_delivered(open_llm: OpenLLM) -> None:
    llm = open_llm()
    engine = llm._parts.engine
    flushed_in_sink: list[bool] = []
    done = threading.Event()

    def sink(chunk: StreamChunk | Exception) -> None:
        if isinstance(chunk, StreamChunk) and chunk.output is not None:
            flushed_in_sink.append(engine.wait_captured(0))
            done.set()

    engine.submit(llm._prompt(_DONOR, params(2), None), sink)
    assert done.wait(PATIENCE_S)
    assert flushed_in_sink == [False]
    assert llm.flush()
    assert llm.stats()["donors"]["nodes"] == 1


def test_a_capture_that_fails_is_counted_and_frees_its_slot(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    assert llm._parts.donors is not None

    def broken(*args: Any) -> None:
        raise RuntimeError("no memory for a copy")

    llm._parts.donors.capture = broken  # type: ignore[method-assign]
    for _ in range(3):
        assert len(llm.generate(_DONOR, params(2)).token_ids) == 2
    assert llm.flush()
    assert outcomes(llm)["capture_failed"] == 3
    assert llm.stats()["donors"]["nodes"] == 0


def test_a_known_request_is_not_stored_twice(open_llm: OpenLLM) -> None:
    llm = open_llm()
    for _ in range(3):
        llm.generate(_DONOR, params(2))
        llm.flush()
    donors = llm.stats()["donors"]
    assert donors["nodes"] == 1
    assert donors["events"]["capture_known"] == 2


def test_donors_found_by_meaning_are_used_if_they_come_in_time(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    donors = llm._parts.donors
    assert donors is not None
    asked: list[str] = []
    given: list[tuple[str, ...]] = []
    searched = threading.Event()
    find = donors.find

    def similar(text: str, ns: str) -> tuple[str, ...]:
        asked.append(text)
        searched.set()
        return ("nobody-knows-it",)

    def recorded(keys: Any, ns: str, options: Any, similar: tuple[str, ...], *rest: Any) -> Any:
        given.append(similar)
        return find(keys, ns, options, similar, *rest)

    donors.similar, donors.find = similar, recorded  # type: ignore[method-assign]
    gate = Gate(llm._parts.runner, "decode")
    first = Inbox(llm, _PROMPTS[0], params(2))
    gate.wait()
    second = Inbox(llm, _PROMPTS[1], params(2))
    assert searched.wait(PATIENCE_S)
    assert eventually(lambda: bool(llm._parts.engine._waiting[0].similar))
    gate.open()
    first.result()
    second.result()
    assert asked == [_PROMPTS[1]]  # the first did not wait: it was not held up by a search
    assert given == [(), ("nobody-knows-it",)]


# -- options of one request ---------------------------------------------------------------------


def test_sharing_of_one_request(llm: KVShare) -> None:
    salt = "sharing-option"
    full = llm.generate(_TARGET, params(4), RequestOptions(sharing="off", cache_salt=salt))
    llm.flush()
    assert full.provenance.declined == "sharing_off"
    first = llm.generate(_DONOR, params(4), RequestOptions(cache_salt=salt))
    llm.flush()
    assert first.provenance.declined == "no_donor"  # what shares nothing is no donor either
    unstored = {"cache_salt": salt, "store": False}
    off = llm.generate(_TARGET, params(4), RequestOptions(sharing="off", **unstored))
    exact = llm.generate(_TARGET, params(4), RequestOptions(sharing="exact", **unstored))
    on = llm.generate(_TARGET, params(4), RequestOptions(sharing="on", **unstored))
    assert (off.provenance.exact, off.provenance.reused) == (0, 0)
    assert off.provenance.declined == "sharing_off"
    assert exact.provenance.exact > 0
    assert exact.provenance.reused == 0
    assert exact.provenance.declined == "exact_only"
    assert on.provenance.reused > 0
    assert on.provenance.declined is None
    assert exact.token_ids == off.token_ids == full.token_ids


def test_repair_of_one_request(llm: KVShare) -> None:
    salt = "repair-option"
    llm.generate(_DONOR, params(2), RequestOptions(cache_salt=salt))
    llm.flush()

    def computed(repair: str | None) -> int:
        options = RequestOptions(cache_salt=salt, repair=repair, store=False)
        return llm.generate(_TARGET, params(2), options).provenance.recomputed

    none = computed("none")
    assert none < computed("window:4") < computed("window:16+tail:30")
    assert none <= computed(None)
    assert computed("deviation:0.5") > none


def test_salts_do_not_share(llm: KVShare) -> None:
    llm.generate(_DONOR, params(2), RequestOptions(cache_salt="tenant a"))
    llm.flush()
    for salt, reuses in (("tenant a", True), ("tenant b", False), ("TENANT A", False)):
        options = RequestOptions(cache_salt=salt, store=False)
        p = llm.generate(_TARGET, params(2), options).provenance
        assert (p.reused > 0) == reuses
        assert (p.declined == "no_donor") != reuses


def test_the_engines_salt_holds_unless_a_request_has_its_own(open_llm: OpenLLM) -> None:
    llm = open_llm(cache_salt="house")
    llm.generate(_DONOR, params(2))
    llm.flush()
    unstored = RequestOptions(store=False)
    assert llm.generate(_TARGET, params(2), unstored).provenance.reused > 0
    named = RequestOptions(cache_salt="house", store=False)
    assert llm.generate(_TARGET, params(2), named).provenance.reused > 0
    other = RequestOptions(cache_salt="", store=False)
    assert llm.generate(_TARGET, params(2), other).provenance.declined == "no_donor"


def test_a_request_that_is_not_stored_is_no_donor(open_llm: OpenLLM) -> None:
    llm = open_llm()
    llm.generate(_DONOR, params(2), RequestOptions(store=False))
    llm.flush()
    assert llm.stats()["donors"]["nodes"] == 0
    assert llm.generate(_TARGET, params(2)).provenance.declined == "no_donor"


def test_sharing_off_for_all(open_llm: OpenLLM) -> None:
    llm = open_llm(sharing="off")
    for options in (None, RequestOptions(sharing="on")):
        output = llm.generate(_DONOR, params(2), options)
        assert output.provenance.declined == "sharing_off"
    assert llm.flush()
    assert "donors" not in llm.stats()


def test_exact_for_all_is_not_widened_by_a_request(open_llm: OpenLLM) -> None:
    llm = open_llm(sharing="exact")
    llm.generate(_DONOR, params(2))
    llm.flush()
    p = llm.generate(_TARGET, params(2), RequestOptions(sharing="on")).provenance
    assert p.exact > 0
    assert p.reused == 0


# -- other models, and threads ------------------------------------------------------------------


def test_a_model_that_cannot_share_is_served_in_full(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2)).eval()
    model.save_pretrained(tmp_path)
    prompts = _PROMPTS[:3]
    with KVShare(str(tmp_path), embedder=None, max_num_seqs=2) as llm:
        outputs = llm.generate(prompts, params(6))
        assert "declined_unsupported_model" in outcomes(llm)
        assert llm.stats()["unsupported"]
        assert llm.flush()
    for output in outputs:
        check_provenance(output)
        assert output.provenance.recomputed == len(output.prompt_token_ids)
        ids = torch.tensor([output.prompt_token_ids])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output.token_ids == tuple(whole[0, ids.shape[1] :].tolist())


def test_the_model_keeps_its_cores_beside_the_threads_that_embed(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def open_index() -> Any:
        seen["embedding"] = torch.get_num_threads()
        raise IndexUnavailableError("none here")

    monkeypatch.setattr("kvshare_mm.assemble._dense", lambda *_: open_index)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        llm = open_llm(embedder="any", max_num_seqs=1)
        prefill = llm._parts.runner.prefill

        def recorded(*args: Any) -> torch.Tensor:
            seen["model"] = torch.get_num_threads()
            return prefill(*args)

        def similar(*args: Any) -> tuple[str, ...]:
            seen["search"] = torch.get_num_threads()
            return ()

        llm._parts.runner.prefill = recorded  # type: ignore[method-assign]
        assert llm._parts.donors is not None
        llm._parts.donors.similar = similar  # type: ignore[method-assign]
        llm.generate(_PROMPTS[:3], params(3))
        llm.flush()
        assert eventually(lambda: "search" in seen)
        assert seen == {"embedding": 1, "model": 2, "search": 1}
        later = threading.Thread(target=lambda: seen.update(later=torch.get_num_threads()))
        later.start()
        later.join()
        assert (torch.get_num_threads(), seen["later"]) == (2, 2)
    finally:
        torch.set_num_threads(before)
