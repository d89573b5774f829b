"""The Python API: `KVShare`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeGuard, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kvshare_mm.answers import achunks, answer, answers, chunks
from kvshare_mm.asked import Given, asked_for
from kvshare_mm.assemble import Parts, assemble
from kvshare_mm.chat import Message, Prompt
from kvshare_mm.config import KVShareConfig, RequestOptions
from kvshare_mm.errors import ConfigError, InvalidRequestError
from kvshare_mm.modalities.seen import SeenMedium
from kvshare_mm.options import Options
from kvshare_mm.outputs import RequestOutput, StreamChunk
from kvshare_mm.reading import Reader
from kvshare_mm.request import RequestSpec
from kvshare_mm.reuse.admin import CacheAdmin
from kvshare_mm.reuse.catalogue import Found
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import Modality
from kvshare_mm.text_bound import TextBound

if TYPE_CHECKING:
    from kvshare_mm.vllm.offline import VLLMParts


class KVShare:
    """Serves a language model and shares KV cache between similar requests.

    >>> with KVShare("smollm2") as llm:
    ...     print(llm.chat([{"role": "user", "content": "What is KV cache?"}]).text)

    With ``engine="vllm"``, vLLM runs the model in processes of its own and KVShare works inside it
    (`kvshare_mm.vllm`). Requests hold text and pictures only then, and the donors live in vLLM's
    processes: `cache`, `lookup` and `flush` raise ConfigError.

    Args:
        model: hub name, folder, ``.gguf`` file, or an embedded one: ``smollm2``, ``tiny-vl`` (sees
            pictures), ``tiny-audio`` (hears).
        options: the fields of `kvshare_mm.config.KVShareConfig`.

    Raises:
        ConfigError: an option is wrong.
        ModelLoadError: the model cannot be loaded.
        StoreError: ``store_dir`` cannot be used.
    """

    def __init__(self, model: str = "smollm2", **options: Unpack[Options]) -> None:
        self.config = KVShareConfig.of(model=model, **options)
        self._parts = _assemble(self.config)
        #: What is tokenised at most.
        self.text_bound = TextBound(self._parts.loaded.tokenizer, self.max_model_len)
        self._reader = Reader(self._parts, self.config, self.text_bound, self.max_model_len)
        donors = self._parts.donors
        self._cache = (
            None
            if donors is None
            else CacheAdmin(donors, self._parts.loaded.tokenizer, self._parts.seen)
        )

    # -- one request or many ----------------------------------------------------------------

    @overload
    def generate(
        self,
        prompts: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one prompt (text or token ids) or a list of them.

        Args:
            params: how answers are decoded.
            options: what may be reused, and for whom.
            given: fields of either by name, as in ``generate("Hi", max_tokens=5)``.

        Raises:
            InvalidRequestError: a prompt cannot be served; raised before any is.
            QueueFullError: more prompts than the queue takes.
        """
        asked = asked_for(params, options, given)
        if isinstance(prompts, str) or _are_token_ids(prompts):
            return answers(self._parts.engine, [self._reader.prompt(prompts, asked)])[0]
        if not isinstance(prompts, Sequence):
            raise InvalidRequestError("prompts are text, token ids, or a list of them", "prompt")
        return answers(self._parts.engine, [self._reader.prompt(p, asked) for p in prompts])  # type: ignore[arg-type]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a chat, or a list of them: messages as in OpenAI's API.

        A part of a message is text (``{"type": "text", "text": ...}``), a picture (``image_url``:
        a URL, a data URL, a path or the file's bytes; or ``image``: a path, the file's bytes or a
        PIL image), a video (``video``: a list of frames as of ``image``, with their number a second
        as ``fps``; or ``video_url``: ``data:video/jpeg;base64,<frame>,<frame>``) or sound
        (``input_audio``: base64 and format; or ``audio``: a path, the file's bytes or samples with
        their rate), as far as the model takes it.

        Args: as `generate`; also ``tools``, ``tool_choice`` and ``parallel_tool_calls``, as in
            OpenAI's API (`kvshare_mm.tools`). The answer's calls are in its `tool_calls`.

        Raises:
            InvalidRequestError: messages or media that cannot be read; `field` names the part.
                Raised before any chat is served.
            QueueFullError: too many requests wait.
        """
        asked = asked_for(params, options, given)
        if _are_chats(messages):
            return answers(self._parts.engine, [self._reader.chat(one, asked) for one in messages])
        return answers(self._parts.engine, [self._reader.chat(messages, asked)])[0]  # type: ignore[arg-type]

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> Iterator[StreamChunk]:
        """Chunks of the answer to a prompt or a chat as they come; the last has the output.

        Leaving the iterator early cancels the request; it is submitted with the first step.
        """
        return chunks(self._parts.engine, self.read(prompt, params, options, **given))

    # -- async twins ------------------------------------------------------------------------

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> RequestOutput:
        """`generate` for one prompt; cancelling the task cancels the request."""
        asked = asked_for(params, options, given)
        return await answer(self._parts.engine, self._reader.prompt(prompt, asked))

    async def achat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> RequestOutput:
        """`chat`; cancelling the task cancels the request."""
        # Pictures and sound take time to decode; the loop has others to serve meanwhile.
        asked = asked_for(params, options, given)
        spec = await asyncio.to_thread(self._reader.chat, messages, asked)
        return await answer(self._parts.engine, spec)

    def read(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> RequestSpec:
        """A prompt or a chat as the engine takes it, for `astream`; nothing is run.

        Raises:
            InvalidRequestError: as `generate` and `chat`.
        """
        asked = asked_for(params, options, given)
        if isinstance(prompt, str) or _are_token_ids(prompt):
            return self._reader.prompt(prompt, asked)
        if isinstance(prompt, Sequence) and prompt:
            return self._reader.chat(prompt, asked)  # type: ignore[arg-type]
        return self._reader.prompt(prompt, asked)  # type: ignore[arg-type]

    def astream(
        self,
        prompt: Prompt | Sequence[Message] | RequestSpec,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        **given: Unpack[Given],
    ) -> AsyncGenerator[StreamChunk]:
        """`stream`; leaving the iterator early cancels the request.

        The prompt is read at the call, unless `read` did so: messages with media are best given
        from another thread.
        """
        if not isinstance(prompt, RequestSpec):
            prompt = self.read(prompt, params, options, **given)
        elif params or options or given:
            raise InvalidRequestError("what was read has its options already", "options")
        return achunks(self._parts.engine, prompt)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self._parts.loaded.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self._parts.engine.max_model_len

    @property
    def modalities(self) -> frozenset[Modality]:
        """What a message may hold beside text."""
        return self._parts.media.adapters.modalities

    # -- the cache --------------------------------------------------------------------------

    @property
    def has_cache(self) -> bool:
        """Whether donors are kept in this process, for `cache` to administrate."""
        return self._cache is not None

    @property
    def cache(self) -> CacheAdmin:
        """Administration of the donors.

        Raises:
            ConfigError: this model, or this configuration, has none; see `has_cache`.
        """
        if self._cache is None:
            raise ConfigError(
                "cache: the donors are in vLLM's processes"
                if self.config.engine == "vllm"
                else "cache: no donors are kept, by reuse='off' or since this model shares no KV"
            )
        return self._cache

    def lookup(
        self, prompt: Prompt | Sequence[Message], options: RequestOptions | None = None
    ) -> Found | None:
        """What a request would reuse if it came now; nothing is run or stored.

        Returns:
            The plan and what it took to make it; None if nothing can ever be reused.

        Raises:
            InvalidRequestError: as `generate` and `chat`.
        """
        spec = self.read(prompt, options=options)
        if self.config.engine == "vllm":
            raise ConfigError("lookup: the donors are in vLLM's processes; see a request's answer")
        if self._parts.donors is None or spec.options.reuse == "off":
            return None
        policy = spec.options.policy or self.config.policy
        planner = self.config.planner
        if spec.options.reuse == "exact":
            planner = planner.but_exact_only()
        return self._parts.donors.reuse.find(
            spec.stream, spec.namespace, planner, policy, look_only=True
        )

    def tokenize(self, prompt: Prompt | Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a prompt or a chat, as the model would get it."""
        return tuple(self.read(prompt).stream.token_ids.tolist())

    def embed(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """Embed texts with the embedder that finds donors by meaning.

        Returns:
            ``[len(texts), dim]`` float32, rows of unit length; and the tokens of all texts.

        Raises:
            ConfigError: the engine runs without ``embedder``.
            InvalidRequestError: no texts, or more than the context holds.
            ModelLoadError: the embedder cannot be loaded.
        """
        if self._parts.embedder is None:
            raise ConfigError("embeddings need an embedder, e.g. --embedder all-MiniLM-L6-v2")
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t for t in texts):
            raise InvalidRequestError("input must be text or a list of texts, none empty", "input")
        self.text_bound.check(texts, "input")
        embedder = self._parts.embedder()
        return embedder.embed(texts), embedder.num_tokens(texts)

    def namespace(self, cache_salt: str | None = None) -> str:
        """The namespace of requests with this salt; None: the engine's."""
        salt = self.config.cache_salt if cache_salt is None else cache_salt
        return namespace(self._parts.loaded.fingerprint, salt)

    # -- state ------------------------------------------------------------------------------

    def cancel(self, request_id: str) -> None:
        """End a request at its next token."""
        self._parts.engine.cancel(request_id)

    @property
    def healthy(self) -> bool:
        """False once the engine has ended, or the model fails for one request after the other and
        when it is tried alone."""
        return self._parts.engine.healthy

    @property
    def stuck_s(self) -> float:
        """Seconds for which requests have been there and the model has not computed one layer."""
        return self._parts.engine.stuck_s

    def stats(self) -> dict[str, Any]:
        """Counters since the start and sizes now; see `kvshare_mm.assemble.Parts.stats`."""
        return self._parts.stats()

    def similar_media(
        self, part: Mapping[str, Any], k: int = 5, cache_salt: str | None = None
    ) -> list[SeenMedium]:
        """Pictures or clips that were sent before and are like one, the most alike first; frames
        of video that are like its first.

        For showing; what is reused is decided by tokens and hashes alone.

        Args:
            part: a picture or clip, as in a message.
            k: at most so many.
            cache_salt: whose media; the engine's salt if None.

        Raises:
            ConfigError: the engine runs without ``media_embedder``.
            InvalidRequestError: the part cannot be read.
            ModelLoadError: the embedder cannot be loaded.
        """
        if self._parts.seen is None:
            raise ConfigError("similar media are only known with media_embedder, e.g. tiny-clip")
        if not isinstance(part, Mapping):
            raise InvalidRequestError("part must be an object with a type", "part")
        salt = self.config.cache_salt if cache_salt is None else cache_salt
        item = self._parts.media.adapters.read(part, "part", salt)
        return self._parts.seen.like(item, namespace(self._parts.loaded.fingerprint, salt), k)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until what was asked so far is a donor, searchable and on disk; False on time-out.

        Raises:
            ConfigError: vLLM runs the model, and does not tell.
        """
        return self._parts.flush(timeout_s)

    def wait_audited(self, timeout_s: float | None = None) -> bool:
        """Wait until all requests that were drawn for an audit are audited; False on time-out."""
        return self._parts.wait_audited(timeout_s)

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


def _assemble(config: KVShareConfig) -> Parts | VLLMParts:
    if config.engine == "native":
        return assemble(config)
    from kvshare_mm.vllm.offline import assemble_vllm

    return assemble_vllm(config)


def _are_token_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], int)


def _are_chats(messages: object) -> TypeGuard[Sequence[Sequence[Message]]]:
    return isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list)
