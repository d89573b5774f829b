"""Prompts to ask a tiny model, and ways to hold up, watch and wait for its engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kvshare_mm import KVShare, RequestOptions, RequestOutput, SamplingParams, StreamChunk

from ..helpers import until

OpenLLM = Callable[..., KVShare]

PATIENCE_S = 60
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


def idle(llm: KVShare) -> None:
    """Wait until nothing waits or runs, all that ended is counted, and all slots are free."""
    engine = inside(llm).engine
    until(lambda: llm.stats()["queue"] == {"waiting": 0, "running": 0}, PATIENCE_S)
    until(lambda: not engine._known, PATIENCE_S)
    until(lambda: len(engine._free) == inside(llm).runner.num_slots, PATIENCE_S)


def outcomes(llm: KVShare) -> dict[str, int]:
    counts: dict[str, int] = llm.stats()["requests"]
    return counts


def inside(llm: KVShare) -> Any:
    """The parts of a server."""
    return llm._parts


class Gate:
    """Holds up one method of a part of a server; lets everything through once opened.

    Args:
        when: which calls, by their arguments.
    """

    def __init__(
        self, part: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()
        real = getattr(part, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                self.entered.set()
                assert self._open.wait(PATIENCE_S)
            return real(*args, **kwargs)

        setattr(part, name, held)

    def wait(self) -> None:
        assert self.entered.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


class Inbox:
    """A sink, and the request submitted with it.

    Args:
        cancelled_after: chunks behind which it is cancelled, by the sink.
    """

    def __init__(
        self,
        llm: KVShare,
        prompt: str,
        sampling: SamplingParams,
        options: RequestOptions | None = None,
        cancelled_after: int | None = None,
    ) -> None:
        self._llm, self._cancelled_after = llm, cancelled_after
        self._submitted = threading.Event()
        self.chunks: list[StreamChunk] = []
        self.error: Exception | None = None
        self._done = threading.Event()
        spec = llm.read(prompt, sampling, options)
        self.request_id = inside(llm).engine.submit(spec, self)
        self._submitted.set()

    def __call__(self, chunk: StreamChunk | Exception) -> None:
        if isinstance(chunk, Exception):
            self.error = chunk
            self._done.set()
        else:
            self.chunks.append(chunk)
            if len(self.chunks) == self._cancelled_after:
                assert self._submitted.wait(PATIENCE_S)
                inside(self._llm).engine.cancel(self.request_id)
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
