"""The Python API: `KVShare`."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, overload

from transformers import PreTrainedTokenizerBase

from kvshare_mm.assemble import assemble
from kvshare_mm.chat import Message, Prompt, chat_stream, prompt_stream
from kvshare_mm.config import KVShareConfig
from kvshare_mm.donors import namespace
from kvshare_mm.engine.prefill import Sharing
from kvshare_mm.engine.request import RequestSpec
from kvshare_mm.outputs import RequestOutput, StreamChunk
from kvshare_mm.repair import make_policy
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import SegmentStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a single request may set for itself; None means the engine's setting.

    Attributes:
        sharing: "on", "exact" or "off".
        repair: repair policy, e.g. "window:8".
        cache_salt: only requests with the same salt share KV.
        store: whether the request becomes a donor.
    """

    sharing: Sharing | None = None
    repair: str | None = None
    cache_salt: str | None = None
    store: bool = True


class KVShare:
    """Serves a language model and shares KV cache between similar requests.

    >>> with KVShare("smollm2") as llm:
    ...     print(llm.chat([{"role": "user", "content": "What is KV cache?"}]).text)

    Args:
        model: hub name, folder, ``.gguf`` file, or the embedded ``smollm2``.
        options: the fields of `kvshare_mm.config.KVShareConfig`.

    Raises:
        ConfigError: an option is wrong.
        ModelLoadError: the model cannot be loaded.
        StoreError: ``store_dir`` cannot be used.
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        self.config = KVShareConfig.of(model=model, **options)
        self._parts = assemble(self.config)

    # -- one request or many ----------------------------------------------------------------

    @overload
    def generate(
        self,
        prompts: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one prompt (text or token ids) or a list of them.

        Raises:
            InvalidRequestError: a prompt cannot be served; raised before any is.
            QueueFullError: more prompts than the queue takes.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            return self._submit(self._prompt(prompts, params, options)).result()  # type: ignore[arg-type]
        specs = [self._prompt(p, params, options) for p in prompts]  # type: ignore[arg-type]
        return [future.result() for future in [self._submit(s) for s in specs]]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput:
        """Answer a chat: messages as in OpenAI's API."""
        return self._submit(self._chat(messages, params, options)).result()

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Iterator[StreamChunk]:
        """Chunks of the answer to a prompt or a chat as they come; the last has the output.

        Leaving the iterator early cancels the request.
        """
        chunks: queue.SimpleQueue[StreamChunk | Exception] = queue.SimpleQueue()
        request_id = self._parts.engine.submit(self._any(prompt, params, options), chunks.put)
        try:
            while True:
                chunk = chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
                if chunk.output is not None:
                    return
        finally:
            self.cancel(request_id)

    # -- async twins ------------------------------------------------------------------------

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput:
        """`generate` for one prompt; cancelling the task cancels the request."""
        return await self._await(self._prompt(prompt, params, options))

    async def achat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput:
        """`chat`; cancelling the task cancels the request."""
        return await self._await(self._chat(messages, params, options))

    async def astream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """`stream`; leaving the iterator early cancels the request."""
        async for chunk in self._achunks(self._any(prompt, params, options)):
            yield chunk

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self._parts.loaded.tokenizer

    # -- state ------------------------------------------------------------------------------

    def cancel(self, request_id: str) -> None:
        """End a request at its next token."""
        self._parts.engine.cancel(request_id)

    def stats(self) -> dict[str, Any]:
        """Counters since the start and sizes now; see `kvshare_mm.assemble.Parts.stats`."""
        return self._parts.stats()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until finished requests are donors, searchable and on disk; False on time-out."""
        return self._parts.flush(timeout_s)

    def close(self) -> None:
        """Abort what is in flight, keep what is finished, release everything."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------

    def _any(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None,
        options: RequestOptions | None,
    ) -> RequestSpec:
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return self._prompt(prompt, params, options)  # type: ignore[arg-type]
        return self._chat(prompt, params, options)  # type: ignore[arg-type]

    def _prompt(
        self, prompt: Prompt, params: SamplingParams | None, options: RequestOptions | None
    ) -> RequestSpec:
        return self._spec(*prompt_stream(prompt, self._parts.loaded.tokenizer), params, options)

    def _chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None,
        options: RequestOptions | None,
    ) -> RequestSpec:
        return self._spec(*chat_stream(messages, self._parts.loaded.tokenizer), params, options)

    def _spec(
        self,
        stream: SegmentStream,
        text: str,
        params: SamplingParams | None,
        options: RequestOptions | None,
    ) -> RequestSpec:
        options = options or RequestOptions()
        salt = self.config.cache_salt if options.cache_salt is None else options.cache_salt
        return RequestSpec(
            stream=stream,
            text=text,
            params=params or SamplingParams(),
            namespace=namespace(self._parts.loaded.fingerprint, salt),
            sharing=options.sharing or self.config.sharing,
            policy=make_policy(options.repair) if options.repair else None,
            store=options.store,
        )

    def _submit(self, spec: RequestSpec) -> Future[RequestOutput]:
        future: Future[RequestOutput] = Future()

        def sink(chunk: StreamChunk | Exception) -> None:
            if isinstance(chunk, Exception):
                future.set_exception(chunk)
            elif chunk.output is not None:
                future.set_result(chunk.output)

        self._parts.engine.submit(spec, sink)
        return future

    async def _await(self, spec: RequestSpec) -> RequestOutput:
        async for chunk in self._achunks(spec):
            if chunk.output is not None:
                return chunk.output
        raise RuntimeError("the engine ended a request without an output")

    async def _achunks(self, spec: RequestSpec) -> AsyncIterator[StreamChunk]:
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[StreamChunk | Exception] = asyncio.Queue()

        def sink(chunk: StreamChunk | Exception) -> None:
            # The loop may be closed by the time a cancelled request ends.
            if not loop.is_closed():
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        request_id = self._parts.engine.submit(spec, sink)
        try:
            while True:
                chunk = await chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
                if chunk.output is not None:
                    return
        finally:
            self.cancel(request_id)
