"""Running the prompts of one request: whole answers, or a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from kvshare_mm.apps.server.answering import Answers, EventStream, answers, unless_gone
from kvshare_mm.apps.server.errors import ApiError, as_api_error
from kvshare_mm.apps.server.keys import Caller
from kvshare_mm.apps.server.limits import Bill
from kvshare_mm.apps.server.replies import PROMPT_TOKENS, prompt_tokens, provenance, usage
from kvshare_mm.apps.server.schema import KVShareField
from kvshare_mm.apps.server.scope import scope
from kvshare_mm.apps.server.service import Service
from kvshare_mm.config import RequestOptions
from kvshare_mm.outputs import RequestOutput, StreamChunk, TokenLogprob
from kvshare_mm.request import RequestSpec
from kvshare_mm.sampling import SamplingParams

Prompt = Any  # text, token ids or messages: what `KVShare.astream` takes
_CHARACTERS_PER_TOKEN = 4
Piece = Callable[[int, str, Sequence[TokenLogprob], str | None], dict[str, Any]]
Whole = Callable[[int, RequestOutput], dict[str, Any]]


def request_options(
    service: Service, caller: Caller, salt: str | None, ours: KVShareField
) -> RequestOptions:
    """How a request may reuse: what it asks for, within what the server allows."""
    options = scope(service.options.scope, caller, salt)
    return replace(
        options,
        reuse=options.reuse or ours.reuse,  # "off" where there is nobody to share with
        repair=ours.repair,
        max_divergence=ours.max_divergence,
        store=options.store and ours.store,
        tenant=caller.tenant,
    )


class Generation:
    """The answers to one request.

    Args:
        service: what runs them.
        request: the HTTP request.
        runs: prompt and parameters of each answer, in order.
        options: how they may reuse.
        head: fields that every reply has: id, model, created.
        spans: whether provenance lists its spans.
        tools: what the answers may call, as `KVShare.read` takes it.

    Attributes:
        specs: the requests, once they are read.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        runs: Sequence[tuple[Prompt, SamplingParams]],
        options: RequestOptions,
        head: dict[str, Any],
        spans: bool,
        tools: Mapping[str, Any] | None = None,
    ) -> None:
        self.specs: list[RequestSpec] = []
        self._read = partial(service.llm.read, **(tools or {}))
        self._tools_size = len(json.dumps(tools)) // _CHARACTERS_PER_TOKEN if tools else 0
        self._service = service
        self._request = request
        self._runs = runs
        self._options = options
        self._head = head
        self._spans = spans
        self._bill = Bill()
        self._outputs: dict[int, RequestOutput] = {}
        self._num_tokens: dict[int, int] = {}

    async def whole(self, kind: str, choice: Whole) -> Response:
        """All answers at once.

        Args:
            kind: value of the field `object`.
            choice: one choice of the reply.
        """

        async def run() -> Response:
            async with asyncio.timeout(self._service.options.request_timeout_s):
                async with answers(await self._streams(), self._count) as chunks:
                    async for index, chunk in chunks:
                        self._take(index, chunk)
            done = [self._outputs[i] for i in range(len(self._runs))]
            body = {
                **self._head,
                "object": kind,
                "choices": [choice(i, output) for i, output in enumerate(done)],
                "usage": usage(done),
                "kvshare": provenance(done, self._spans),
            }
            return JSONResponse(body)

        try:
            reply = await unless_gone(self._request.receive, self._request.scope, run())
        except Exception as error:
            raise as_api_error(error, self._service.retry_after) from error
        finally:
            self._settle()
        return reply if reply is not None else Response(status_code=204)  # nobody reads it

    async def stream(
        self,
        kind: str,
        first: Callable[[int], dict[str, Any]] | None,
        piece: Piece,
        with_usage: bool,
    ) -> Response:
        """Answers as they come.

        Args:
            kind: value of the field `object`.
            first: a choice sent before the first piece of each answer, or None.
            piece: a choice with new text; its last argument is why the answer ends, if it does.
            with_usage: whether a last event counts the tokens.
        """

        async def begin() -> Answers:
            running = Answers(await self._streams(), self._count)
            try:
                await running.started()
            except BaseException:
                await running.close()
                raise
            return running

        running: Answers | None = None
        try:
            running = await unless_gone(self._request.receive, self._request.scope, begin())
        except Exception as error:
            raise as_api_error(error, self._service.retry_after) from error
        finally:
            if running is None:
                self._settle()
        if running is None:
            return Response(status_code=204)  # nobody reads it
        events = self._events(running, kind, first, piece, with_usage)

        async def close() -> None:
            try:
                await running.close()
            finally:
                self._settle()

        return EventStream(events, close)

    async def _events(
        self,
        running: Answers,
        kind: str,
        first: Callable[[int], dict[str, Any]] | None,
        piece: Piece,
        with_usage: bool,
    ) -> AsyncIterator[str]:
        head = {**self._head, "object": kind}
        if with_usage:
            head["usage"] = None

        def event(*choices: dict[str, Any], **more: Any) -> str:
            return json.dumps({**head, "choices": choices, **more})

        sent = [0] * len(self._runs)
        begun: set[int] = set()
        outputs = self._outputs
        try:
            async with asyncio.timeout(self._service.options.request_timeout_s):
                async for index, chunk in running:
                    if first is not None and index not in begun:
                        yield event(first(index))
                    begun.add(index)
                    logprobs = _new_logprobs(chunk, sent[index])
                    sent[index] += len(logprobs)
                    self._take(index, chunk)
                    output = chunk.output
                    if output is None:
                        told = piece(index, chunk.text, logprobs, None)
                        if told["logprobs"] or told.get("text") or told.get("delta"):
                            yield event(told)
                        continue
                    last = piece(index, chunk.text, logprobs, output.finish_reason)
                    done = len(outputs) == len(self._runs)
                    # A field of its own is where OpenAI's client keeps what it does not know.
                    more = {"kvshare": self._provenance()} if done else {}
                    yield event(last, **more)
            if with_usage:
                yield event(usage=usage([outputs[i] for i in sorted(outputs)]))
        except Exception as error:
            # The status is gone already; clients look for `error` in the events.
            yield json.dumps(as_api_error(error).body)
        yield "[DONE]"

    async def _streams(self) -> list[Any]:
        llm, service = self._service.llm, self._service
        caller = self._request.state.caller
        if (meter := service.meters.of(caller.key, caller.limits)) is not None:
            prompts = {id(prompt): prompt for prompt, _ in self._runs}  # one may have many answers
            size = sum(_size(prompt) + self._tools_size for prompt in prompts.values())
            self._bill = meter.reserve(size, sum(p.max_tokens or 0 for _, p in self._runs))
        # One after the other: what is wrong with a prompt is known before any is submitted.
        specs = self.specs
        sizes: dict[int, int] = {}
        for prompt, params in self._runs:
            line = service.lines.of(prompt)
            specs.append(await line.run(caller.tenant, self._read, prompt, params, self._options))
            sizes[id(prompt)] = len(specs[-1].stream)
            self._bill.read(sum(sizes.values()))
        return [llm.astream(spec) for spec in specs]

    def _provenance(self) -> dict[str, Any]:
        return provenance([self._outputs[i] for i in sorted(self._outputs)], self._spans)

    def _count(self, index: int, chunk: StreamChunk) -> None:
        """Tokens cost when they are made, not when somebody reads them."""
        output = chunk.output
        if output is None:
            self._num_tokens[index] = self._num_tokens.get(index, 0) + len(chunk.token_ids)
        else:
            self._num_tokens[index] = len(output.token_ids)
        self._bill.answered(sum(self._num_tokens.values()))

    def _take(self, index: int, chunk: StreamChunk) -> None:
        """An answer is complete, or not yet."""
        output = chunk.output
        if output is None:
            return
        self._outputs[index] = output
        request_id = self._request.scope["state"]["request_id"]
        self._service.finished(output, request_id, dict(self._request.headers))

    def _settle(self) -> None:
        """It is over, well or not."""
        done = [self._outputs[i] for i in sorted(self._outputs)]
        num_tokens, origin = prompt_tokens(done)
        self._bill.settle(num_tokens if len(done) == len(self._runs) else None)
        self._request.scope["state"][PROMPT_TOKENS] = origin  # for the log


def _size(prompt: Prompt) -> int:
    """About how many tokens a prompt has, pictures and sound aside."""
    if isinstance(prompt, str):
        return len(prompt) // _CHARACTERS_PER_TOKEN
    if not prompt or isinstance(prompt[0], int):
        return len(prompt)
    contents = (message["content"] for message in prompt)
    parts = (part for c in contents for part in ([{"text": c}] if isinstance(c, str) else c))
    calls = sum(len(str(message.get("tool_calls", ""))) for message in prompt)
    return (calls + sum(len(part.get("text", "")) for part in parts)) // _CHARACTERS_PER_TOKEN


def _new_logprobs(chunk: StreamChunk, sent: int) -> Sequence[TokenLogprob]:
    """Those not sent yet: a last token without text comes with the output only."""
    if chunk.output is not None:
        return (chunk.output.logprobs or ())[sent:]
    return chunk.logprobs


def num_choices(n: int | None, num_prompts: int, most: int) -> int:
    """Answers to each prompt. Raises ApiError: too many, or none."""
    n = 1 if n is None else n
    if not 1 <= n <= most:
        raise ApiError(400, f"n must be 1 to {most}", "n")
    if n * num_prompts > 4 * most:
        raise ApiError(400, f"{n * num_prompts} answers in one request; at most {4 * most}", "n")
    return n
