"""What one key may use."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.server import limits as limits_module
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.generation import Generation
from kvshare_mm.apps.server.keys import KeyRing, Limits, add_key
from kvshare_mm.apps.server.limits import Meter, Meters

from ...helpers import Clock, until
from ..conftest import Run
from .conftest import Running, Start, held

Limited = Callable[..., tuple[Running, str, str]]


def refused(call: Any, *arguments: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        call(*arguments)
    assert raised.value.status == 429 and raised.value.code == "rate_limit_exceeded"
    return raised.value


def test_requests_flow_in_again() -> None:
    clock = Clock()
    meter = Meter(Limits(requests_per_minute=2), clock)
    for _ in range(2):
        meter.begin()
        meter.end()
    assert refused(meter.begin).retry_after == pytest.approx(30)
    clock.now += 29
    refused(meter.begin)
    clock.now += 1.01
    meter.begin()
    assert meter.headers["x-ratelimit-limit-requests"] == "2"
    assert meter.headers["x-ratelimit-remaining-requests"] == "0"
    assert re.fullmatch(r"(59|60)\.\d{3}s", meter.headers["x-ratelimit-reset-requests"])


def test_what_was_not_used_is_given_back() -> None:
    clock = Clock()
    meter = Meter(Limits(prompt_tokens_per_minute=100, output_tokens_per_minute=60), clock)
    bill = meter.reserve(40, 50)
    assert "60 output tokens" in str(refused(meter.reserve, 10, 20))
    bill.answered(10)
    bill.settle(40)
    bill.settle(0)  # once only
    second = meter.reserve(10, 50)
    assert meter.headers["x-ratelimit-remaining-tokens"] == "0"  # of output, the scarcer
    second.answered(50)
    second.settle()
    assert refused(meter.reserve, 0, 30).retry_after == pytest.approx(30)
    # More than fits in is served when all is there, and paid for afterwards.
    clock.now += 60
    meter.reserve(1000, 0)
    assert refused(meter.reserve, 1, 0).retry_after == pytest.approx(60 * 901 / 100)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), max_size=60))
def test_over_time_no_more_is_used_than_flows_in(requests: list[tuple[int, int]]) -> None:
    clock = Clock()
    meter = Meter(Limits(output_tokens_per_minute=60), clock)
    used = 0
    for pause, tokens in requests:
        clock.now += pause
        try:
            bill = meter.reserve(0, tokens)
        except ApiError:
            continue
        bill.answered(tokens)
        bill.settle()
        used += tokens
        assert used <= 60 + (clock.now - 100) + 1e-6


def test_a_file_that_is_read_again_resets_nothing() -> None:
    meters, limits = Meters(), Limits(requests_per_minute=1)
    first = meters.of("k", limits)
    assert first is not None and meters.of("k", Limits(requests_per_minute=1)) is first
    first.begin()
    wider = meters.of("k", Limits(requests_per_minute=5))
    assert wider is not None and wider.headers["x-ratelimit-remaining-requests"] == "5"
    assert meters.of("k", None) is None and meters.of("other", limits) is not first


def test_what_runs_while_limits_change_is_not_counted_for_ever() -> None:
    meters = Meters()
    before = meters.of("k", Limits(concurrent_requests=1))
    assert before is not None
    before.begin()
    after = meters.of("k", Limits(output_tokens_per_minute=60, concurrent_requests=2))
    assert after is not None
    after.begin()
    refused(after.begin)  # the one from before still runs
    before.end()
    after.end()
    for _ in range(2):
        after.begin()
    refused(after.begin)


def test_an_answer_longer_than_reserved_is_paid_for_as_it_grows() -> None:
    meter = Meter(Limits(output_tokens_per_minute=60), Clock())
    bill = meter.reserve(0, 0)  # a request without max_tokens
    bill.answered(50)
    assert meter.headers["x-ratelimit-remaining-tokens"] == "10"
    bill.answered(90)
    assert refused(meter.reserve, 0, 0).retry_after == pytest.approx(30)
    bill.settle(0)
    assert refused(meter.reserve, 0, 0).retry_after == pytest.approx(30)


def test_a_prompt_is_paid_for_once_it_is_read() -> None:
    clock = Clock()
    meter = Meter(Limits(prompt_tokens_per_minute=600), clock)
    first, second = meter.reserve(10, 0), meter.reserve(10, 0)
    first.read(500)
    assert meter.headers["x-ratelimit-remaining-tokens"] == "90"
    # It looked small enough: nothing is computed for it.
    assert refused(second.read, 200).retry_after == pytest.approx(10)
    second.settle()
    first.settle()  # its client has gone
    assert meter.headers["x-ratelimit-remaining-tokens"] == "100"
    # More than a minute's worth is computed when all is there, and paid for afterwards.
    clock.now += 60
    large = meter.reserve(10, 0)
    large.read(900)
    refused(meter.reserve, 0, 0)
    Meter(Limits(None, 600, 60), clock).reserve(0, 1000).read(500)  # the output is overdrawn


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "1"])
def test_limits_are_whole_numbers(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ValueError, match="requests_per_minute"):
        Limits(requests_per_minute=bad)
    file = tmp_path / "keys"
    key = add_key(file, "shop", limits=Limits(2, 3, 4, 5))
    caller = KeyRing(file).caller(key)
    assert caller is not None and caller.limits == Limits(2, 3, 4, 5)
    entry = json.loads(file.read_text())
    entry["limits"]["concurrent_requests"] = bad
    file.write_text(json.dumps(entry))
    with pytest.raises(Exception, match="line 1"):
        KeyRing(file)


def test_keys_are_made_with_limits(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    some = ("keys", "add", file, "--tenant", "shop")
    limits = (
        "--requests-per-minute 60 --prompt-tokens-per-minute 9000 "
        "--output-tokens-per-minute 800 --concurrent-requests 2"
    )
    made = run(*some, *limits.split())
    assert made.exit_code == 0, made.output
    assert json.loads(file.read_text())["limits"] == {
        "requests_per_minute": 60,
        "prompt_tokens_per_minute": 9000,
        "output_tokens_per_minute": 800,
        "concurrent_requests": 2,
    }
    caller = KeyRing(file).caller(made.output.strip())
    assert caller is not None and caller.limits == Limits(60, 9000, 800, 2)
    assert run(*some).exit_code == 0
    assert "limits" not in json.loads(file.read_text().splitlines()[1])
    assert run(*some, "--requests-per-minute", 0).exit_code == 2


@pytest.fixture
def limited(serve: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Limited:
    """Starts a server, and gives a key of it with limits and one without; nothing flows in."""
    monkeypatch.setattr(limits_module, "Meter", lambda limits: Meter(limits, Clock()))

    def make(**limits: int) -> tuple[Running, str, str]:
        file = tmp_path / "keys"
        key = add_key(file, "shop", limits=Limits(**limits))
        free = add_key(file, "free")
        return serve(keys_file=file, scope="tenant", admin_key=None), key, free

    return make


def tokens_left(running: Running, key: str) -> int:
    reply = running.ask("GET", "/v1/models", key)
    return int(reply.headers["x-ratelimit-remaining-tokens"])


def test_a_key_beyond_its_limits_is_told_so(limited: Limited) -> None:
    running, key, free = limited(requests_per_minute=3, output_tokens_per_minute=40)
    reply = running.chat("x", key)
    assert reply.status_code == 200
    assert reply.headers["x-ratelimit-limit-requests"] == "3"
    assert reply.headers["x-ratelimit-remaining-requests"] == "2"
    assert reply.headers["x-ratelimit-limit-tokens"] == "40"
    reply = running.chat("x", key, max_tokens=40)
    assert reply.status_code == 429, "4 tokens of 40 were used a moment ago"
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(reply.headers["retry-after"]) <= 10
    assert running.chat("x", key).status_code == 200
    reply = running.ask("GET", "/v1/models", key)
    assert reply.status_code == 429 and "3 requests a minute" in reply.text
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    for _ in range(4):
        reply = running.chat("x", free)
        assert reply.status_code == 200 and "x-ratelimit-limit-requests" not in reply.headers


def test_streams_and_those_left_give_back_what_they_did_not_use(limited: Limited) -> None:
    running, key, _ = limited(
        prompt_tokens_per_minute=10_000, output_tokens_per_minute=100, concurrent_requests=2
    )
    whole = running.chat("x", key, max_tokens=3, stream=True, ignore_eos=True)
    assert whole.status_code == 200 and 95 <= tokens_left(running, key) <= 98
    with held(running), running.client(key) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=90, stream=True
        )
        next(iter(stream))
        stream.close()
        until(lambda: tokens_left(running, key) > 50)  # of 90 reserved ones a few were made
    assert running.chat("x", key, max_tokens=90, top_p=7).status_code == 400
    assert tokens_left(running, key) > 50


def test_a_stream_that_nobody_reads_is_paid_for(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unread(*_: object) -> AsyncIterator[str]:
        await asyncio.sleep(3600)
        yield ""

    monkeypatch.setattr(Generation, "_events", unread)
    running, key, _ = limited(output_tokens_per_minute=60)
    with running.stream(key, ignore_eos=True):
        until(lambda: tokens_left(running, key) < 40)


def test_a_client_that_leaves_pays_for_its_whole_prompt(limited: Limited) -> None:
    running, key, _ = limited(prompt_tokens_per_minute=600)
    text = "\u4e00\u9f98" * 60  # more tokens than it has characters
    dense: list[Any] = [{"role": "user", "content": text}]
    size = len(running.llm.tokenize(dense))
    assert size > 240
    with running.client(key) as client:
        stream = client.chat.completions.create(model="tiny", messages=dense, stream=True)
        next(iter(stream))
        stream.close()
    until(lambda: running.idle)
    assert tokens_left(running, key) < 600 - size + 30
    for streamed in (False, True):
        reply = running.chat("", key, messages=dense * 2, stream=streamed)
        assert reply.status_code in {400, 429}


def test_requests_of_a_key_at_a_time(limited: Limited, beside: Executor) -> None:
    running, key, _ = limited(concurrent_requests=1)
    begun, end = threading.Event(), threading.Event()
    line = running.service.lines.tokens
    run = line.run

    async def slow(tenant: str, make: Any, *arguments: Any) -> Any:
        begun.set()
        while not end.is_set():
            await asyncio.sleep(0.01)
        return await run(tenant, make, *arguments)

    line.run = slow  # type: ignore[method-assign]
    first = beside.submit(running.chat, "x", key)
    assert begun.wait(30)
    reply = running.ask("GET", "/v1/models", key)
    assert reply.status_code == 429 and "1 requests at a time" in reply.text
    end.set()
    assert first.result(60).status_code == 200
    assert running.ask("GET", "/v1/models", key).status_code == 200


def test_a_bad_line_locks_nobody_out(
    serve: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "shop-a")
    running = serve(keys_file=file, scope="tenant", admin_key=None)
    good = file.read_text()
    file.write_text(good + '{"tenant": "shop-b", "sha256": "typo"}\n')
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert running.ask("GET", "/v1/models", key).status_code == 200
    told = [r.getMessage() for r in caplog.records if "last good keys" in r.getMessage()]
    assert len(told) == 1 and "line 2 of" in told[0]
    assert running.metric("kvshare:key_file_broken") == 1
    file.unlink()
    assert running.ask("GET", "/v1/models", key).status_code == 200
    new = add_key(file, "shop-c")  # a file of its own: the others are gone from it
    assert running.ask("GET", "/v1/models", new).status_code == 200
    assert running.ask("GET", "/v1/models", key).status_code == 401
    assert running.metric("kvshare:key_file_broken") == 0
    file.write_text("")
    assert running.ask("GET", "/v1/models", new).status_code == 401
