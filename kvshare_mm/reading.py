"""What a caller asks for, read into the one request that both engines take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from kvshare_mm.asked import Asked
from kvshare_mm.assemble import Parts
from kvshare_mm.calls import CallReader
from kvshare_mm.chat import Message, Prompt, chat_stream, prompt_stream
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.request import RequestSpec
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.stream import SegmentStream
from kvshare_mm.text_bound import TextBound
from kvshare_mm.tools import style_of

if TYPE_CHECKING:
    from kvshare_mm.vllm.offline import VLLMParts


class Reader:
    """Reads prompts and chats for one engine.

    Args:
        text_bound: what is tokenised at most.
        max_model_len: longest prompt plus answer.
    """

    def __init__(
        self,
        parts: Parts | VLLMParts,
        config: KVShareConfig,
        text_bound: TextBound,
        max_model_len: int,
    ) -> None:
        self._parts = parts
        self._config = config
        self._bound = text_bound
        self._max_model_len = max_model_len
        self._tokenizer = parts.loaded.tokenizer
        self._style = style_of(self._tokenizer.chat_template) or "hermes"

    def prompt(self, prompt: Prompt, asked: Asked) -> RequestSpec:
        """A prompt of text or token ids. Raises InvalidRequestError."""
        if asked.tools is not None:
            raise InvalidRequestError("tools are for chats: send messages", "tools")
        return self._spec(
            *prompt_stream(prompt, self._tokenizer, self._parts.media, self._bound), asked
        )

    def chat(self, messages: Sequence[Message], asked: Asked) -> RequestSpec:
        """A chat. Raises InvalidRequestError."""
        salt = asked.options.cache_salt
        stream, text = chat_stream(
            messages,
            self._tokenizer,
            self._parts.media,
            self._config.cache_salt if salt is None else salt,
            self._bound,
            asked.tools,
        )
        spec = self._spec(stream, text, asked)
        if self._parts.seen is not None and spec.options.store:
            self._parts.seen.add(stream.items, spec.namespace)
        return spec

    def _spec(self, stream: SegmentStream, text: str, asked: Asked) -> RequestSpec:
        options, tools, grammars = asked.options, asked.tools, self._parts.grammars
        if grammars is None and tools is not None and tools.must_call:
            raise InvalidRequestError("tool_choice: with vLLM, none and auto only", "tool_choice")
        asked.params.check(len(self._tokenizer))
        salt = self._config.cache_salt if options.cache_salt is None else options.cache_salt
        spec = RequestSpec(
            stream=stream,
            text=text,
            params=asked.params,
            namespace=namespace(self._parts.loaded.fingerprint, salt),
            options=replace(options, reuse=options.reuse or self._config.reuse, cache_salt=salt),
            grammar=(
                None if grammars is None else grammars.of(asked.params.form, tools, self._style)
            ),
            calls=None if tools is None else partial(CallReader, tools, self._style),
        )
        spec.check(self._max_model_len)
        return spec
