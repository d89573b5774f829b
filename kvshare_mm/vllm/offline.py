"""`KVShare(model, engine="vllm")`: vLLM's engine behind the interface of the native one."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY
from transformers import PreTrainedTokenizerBase

from kvshare_mm.chat import TEXT_ONLY, MediaSupport
from kvshare_mm.config import KVShareConfig, RequestOptions
from kvshare_mm.errors import ConfigError, EngineClosedError, InvalidRequestError, ModelLoadError
from kvshare_mm.models.loader import load_tokenizer
from kvshare_mm.outputs import (
    FinishReason,
    Provenance,
    RequestOutput,
    StreamChunk,
    TokenLogprob,
    count_use,
)
from kvshare_mm.request import Request, RequestSpec, Sink
from kvshare_mm.stream import SegmentStream
from kvshare_mm.vllm.arguments import check_installed, engine_arguments
from kvshare_mm.vllm.failures import noted
from kvshare_mm.vllm.options import OF_REQUESTS
from kvshare_mm.vllm.pictures import NOTHING, picture_support, prompt_of, tokens_written, uses_of
from kvshare_mm.vllm.room import fitted

_MAX_SEED = 1 << 63
# Donors on their way to the disk are written in this time.
_SHUTDOWN_S = 30.0
# How often is looked whether audits are over.
_AUDITED_S = 0.02


@dataclass(frozen=True, slots=True)
class Named:
    """What is known of the model outside vLLM's processes."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str = "vllm"


@dataclass(frozen=True, slots=True)
class VLLMParts:
    """A running vLLM engine; the twin of `kvshare_mm.assemble.Parts`."""

    loaded: Named
    engine: VLLMEngine
    media: MediaSupport = TEXT_ONLY
    donors: None = None
    grammars: None = None
    seen: None = None
    embedder: None = None

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        Returns:
            ``requests``: as of the native engine; ``queue``: running requests, waiting ones
            included; ``kvshare``: what the connector counts.
        """
        return {
            "model": self.loaded.name,
            "engine": "vllm",
            "requests": dict(self.engine.counters),
            "queue": {"running": self.engine.num_running},
            "kvshare": {
                ",".join(
                    [sample.name, *(v for k, v in sample.labels.items() if k not in _PLACE)]
                ): sample.value
                for family in REGISTRY.collect()
                if family.name.startswith("kvshare:")
                for sample in family.samples
                if sample.name.endswith("_total")
            },
        }

    def wait_audited(self, timeout_s: float | None) -> bool:
        """What is over is known from vLLM's statistics."""
        if self.engine.num_drawn and not self.engine.counts:
            raise ConfigError("wait_audited: vLLM does not tell with disable_log_stats")
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while self._num_audited() < self.engine.num_drawn:
            if time.monotonic() > deadline or not self.engine.healthy:
                return False
            time.sleep(_AUDITED_S)
        return True

    def _num_audited(self) -> float:
        counted = self.stats()["kvshare"].items()
        return sum(float(n) for name, n in counted if name.startswith("kvshare:audits_total"))

    def flush(self, timeout_s: float | None) -> bool:
        raise ConfigError("flush: vLLM stores donors in its own processes and does not tell when")

    def close(self) -> None:
        self.engine.close()


_PLACE = frozenset({"engine", "model_name"})


def assemble_vllm(config: KVShareConfig) -> VLLMParts:
    """Start vLLM with KVShare in it.

    Raises:
        ConfigError: vLLM is missing, or an option is not for it.
        ModelLoadError: there is no such model, or vLLM cannot serve it.
    """
    check_installed()
    arguments = fitted(engine_arguments(config), config)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    media = picture_support(config, str(arguments["model"]), tokenizer)
    engine = VLLMEngine(arguments, tokens_written(media, tokenizer))
    return VLLMParts(Named(config.model, tokenizer), engine, media)


@dataclass(eq=False, slots=True)
class _VLLMRequest(Request):
    """A request and the words that vLLM has answered."""

    text: str = ""

    def add(self, output: Any) -> StreamChunk:
        """Take vLLM's next piece (`vllm.CompletionOutput`, of output kind DELTA)."""
        count = self.spec.params.logprobs or 0
        logprobs = tuple(
            _logprob(token, found, count)
            for token, found in zip(output.token_ids, output.logprobs or (), strict=False)
        )
        self.text += output.text
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(logprobs)
        self.times.extend([time.perf_counter()] * len(output.token_ids))
        return StreamChunk(output.text, tuple(output.token_ids), logprobs=logprobs)

    def finish(self, reason: FinishReason, last: Any = None) -> RequestOutput:
        """The whole output.

        Args:
            last: vLLM's last `RequestOutput`, or None if there was none.
        """
        timed = getattr(last, "metrics", None)
        return self.output(
            self.text,
            reason,
            provenance_of(last, self.spec.stream) if last else Provenance(),
            queue=max(0.0, timed.scheduled_ts - timed.queued_ts) if timed else 0.0,
            prefill=max(0.0, timed.first_token_ts - timed.scheduled_ts) if timed else 0.0,
        )


class VLLMEngine:
    """vLLM's asynchronous engine, with a thread for its event loop.

    Args:
        arguments: vLLM's `EngineArgs` by name.
        written: see `pictures.tokens_written`.

    Attributes:
        block_size: tokens of a block of vLLM's prefix cache.
        num_drawn: requests that were drawn for an audit.
        counts: whether vLLM tells what was counted.

    Raises:
        ConfigError: vLLM knows no such argument.
        ModelLoadError: vLLM cannot serve the model.
    """

    def __init__(
        self, arguments: Mapping[str, Any], written: Mapping[int, tuple[int, ...]] = NOTHING
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._written = written
        self.num_drawn = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kvshare-vllm", daemon=True
        )
        self._thread.start()
        try:
            started = asyncio.run_coroutine_threadsafe(_start(arguments), self._loop)
            self._llm: Any = started.result()
        except BaseException:
            self._stop_loop()
            raise
        self.max_model_len = int(self._llm.model_config.max_model_len)
        self.block_size = int(self._llm.vllm_config.cache_config.block_size)
        self.counts = bool(self._llm.log_stats)

    def submit(self, spec: RequestSpec, sink: Sink) -> str:
        """Hand a request to vLLM; chunks and at last its output, or an error, go to `sink`.

        Raises:
            InvalidRequestError: empty prompt, or one longer than the context.
            EngineClosedError: the engine was closed.
        """
        spec.check(self.max_model_len)
        if self._closed:
            raise EngineClosedError("the engine is closed")
        request = _VLLMRequest(spec, sink)

        def begin() -> None:
            task = self._loop.create_task(self._serve(request))
            self._tasks[request.request_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

        self._loop.call_soon_threadsafe(begin)
        return request.request_id

    def cancel(self, request_id: str) -> None:
        """End a request at its next token; an unknown or finished one is not an error."""

        def end() -> None:
            if task := self._tasks.get(request_id):
                task.cancel()

        if not self._closed:
            self._loop.call_soon_threadsafe(end)

    @property
    def healthy(self) -> bool:
        """Whether requests can be expected to be answered."""
        return not self._closed and not self._llm.errored

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    @property
    def stuck_s(self) -> float:
        """Not known: vLLM watches its own processes."""
        return 0.0

    def close(self) -> None:
        """Abort what is in flight, end vLLM's processes."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._stop_loop()

    # -- in the loop's thread ---------------------------------------------------------------

    async def _serve(self, request: _VLLMRequest) -> None:
        spec, sink = request.spec, request.sink
        last = None
        try:
            # Pictures take time to decode; the loop has others to serve meanwhile.
            prompt = await asyncio.to_thread(prompt_of, spec.stream, self._written)
            if spec.options.cache_salt:
                prompt["cache_salt"] = spec.namespace  # a hash: vLLM does not take every text
            params = _sampling_params(spec)
            async for last in self._llm.generate(prompt, params, request.request_id):
                chunk = request.add(last.outputs[0])
                if not last.finished:
                    sink(chunk)
            if last is None:
                raise EngineClosedError("vLLM ended a request without an output")
            reason: FinishReason = "length" if last.outputs[0].finish_reason == "length" else "stop"
            output = request.finish(reason, last)
            self._count(output)
            self.num_drawn += bool(_summary_of(last).get("audit"))
            sink(StreamChunk(chunk.text, chunk.token_ids, output, chunk.logprobs))
        except asyncio.CancelledError:
            self.counters["finished_abort"] += 1
            closed = EngineClosedError("the engine was closed")
            sink(closed if self._closed else StreamChunk("", output=request.finish("abort")))
        except Exception as error:
            self.counters["failed"] += 1
            sink(_as_ours(error))

    def _count(self, output: RequestOutput) -> None:
        count_use(self.counters, output.provenance)
        self.counters[f"finished_{output.finish_reason}"] += 1
        self.counters["generation_tokens"] += len(output.token_ids)
        self.counters["prompt_tokens"] += len(output.prompt_token_ids)

    async def _end(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown(timeout=_SHUTDOWN_S)
        self._llm = None  # its end, when the interpreter's has come, would fail
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:  # vLLM's own
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _as_ours(error: Exception) -> Exception:
    """What vLLM refuses is the request's fault; anything else is vLLM's."""
    from vllm.exceptions import VLLMClientError

    if isinstance(error, ValueError | VLLMClientError):
        field = getattr(error, "parameter", None)
        return InvalidRequestError(f"vLLM refuses this request: {error}", field)
    return EngineClosedError(f"vLLM failed: {error}")


def provenance_of(last: Any, stream: SegmentStream) -> Provenance:
    """Where a prompt's KV came from, as the connector and vLLM's prefix cache tell it.

    Args:
        last: vLLM's last `RequestOutput` of a request.
        stream: its prompt.
    """
    num_tokens = len(stream)
    summary = _summary_of(last)
    reused = int(summary.get("reused") or 0)
    exact = summary.get("exact")
    exact = (last.num_cached_tokens or 0) if exact is None else int(exact)
    return Provenance(
        exact=exact,
        reused=reused,
        recomputed=num_tokens - exact - reused,
        donors=tuple(summary.get("donors") or ()),
        similarity=(exact + reused) / num_tokens,
        declined=summary.get("declined"),
        fallback=summary.get("fallback"),
        expected_divergence=summary.get("expected_divergence"),
        media=uses_of(stream, exact + reused + int(summary.get("gaps") or 0)),
    )


def _summary_of(last: Any) -> dict[str, Any]:
    """What the connector says of a request in vLLM's last `RequestOutput` of it."""
    return dict((last.kv_transfer_params or {}).get("kvshare") or {})


async def _start(arguments: Mapping[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        args = AsyncEngineArgs(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM does not take these options: {error}") from error
    with noted() as cause:
        try:
            return AsyncLLM.from_engine_args(args)
        except Exception as error:  # in any of its processes
            said = cause() or error
            raise ModelLoadError(f"vLLM could not start with this model: {said}") from error


def _as_asked(options: RequestOptions) -> dict[str, Any]:
    """As `request_options` takes them."""
    asked = {name: getattr(options, name) for name in OF_REQUESTS}
    return {name: value for name, value in asked.items() if value is not None}


def _sampling_params(spec: RequestSpec) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    asked = spec.params
    form = asked.form
    return SamplingParams(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=None if asked.seed is None else asked.seed % _MAX_SEED,
        stop=list(asked.stop),
        ignore_eos=asked.ignore_eos,
        logprobs=asked.logprobs,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=dict(asked.logit_bias) or None,
        structured_outputs=None
        if form is None
        else StructuredOutputsParams(**{form.kind: form.value}),
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": {"kvshare": _as_asked(spec.options)}},
    )


def _logprob(token: int, found: Mapping[int, Any], count: int) -> TokenLogprob:
    """vLLM's entry of one token: the chosen one and the most likely ones, by token id."""
    top = sorted((x.rank, i, x.logprob) for i, x in found.items() if x.rank <= count)
    return TokenLogprob(token, found[token].logprob, tuple((i, value) for _, i, value in top))
