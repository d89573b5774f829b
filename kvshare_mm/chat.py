"""Prompts and chat messages to token streams, with every mistake caught at the door."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.base import Adapters
from kvshare_mm.stream import MediaItem, Modality, SegmentStream, media_stream, text_stream
from kvshare_mm.text_bound import TextBound
from kvshare_mm.tools import Tools, earlier_calls, style_of, told_in_words

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class MediaSupport:
    """What a model can see and hear, and how its prompt says so.

    Attributes:
        adapters: read the parts of messages.
        placeholders: the token that stands for a medium, by modality.
        mrope: its rotary positions have three axes.
        spelled: what the model's processor writes for a token of its template.
    """

    adapters: Adapters
    placeholders: Mapping[Modality, int] = field(default_factory=dict)
    mrope: bool = False
    spelled: Mapping[str, str] = field(default_factory=dict)


TEXT_ONLY = MediaSupport(Adapters([]))


def prompt_stream(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    media: MediaSupport = TEXT_ONLY,
    bound: TextBound | None = None,
) -> tuple[SegmentStream, str]:
    """The stream and the text of a prompt given as text or as token ids.

    Args:
        bound: of texts that are tokenised; None: there is none.

    Raises:
        InvalidRequestError: empty, not text, beyond the bound, ids outside the vocabulary, or ids
            that stand for media, which only messages can bring.
    """
    if isinstance(prompt, str):
        if bound is not None:
            bound.check([prompt], "prompt")
        if not prompt.strip():
            raise InvalidRequestError("the prompt is empty", "prompt")
        ids = _token_ids(prompt, tokenizer, "prompt")
        _check_no_media(ids, media)
        return text_stream(ids), prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InvalidRequestError("a prompt is text or a list of token ids", "prompt")
    if bound is not None:
        bound.check_ids(len(prompt), "prompt")
    ids = [t for t in prompt if isinstance(t, int) and not isinstance(t, bool)]
    if len(ids) != len(prompt):
        raise InvalidRequestError("a prompt is text or a list of token ids", "prompt")
    if not ids:
        raise InvalidRequestError("the prompt is empty", "prompt")
    if min(ids) < 0 or max(ids) >= len(tokenizer):
        raise InvalidRequestError(
            f"token ids must lie in 0..{len(tokenizer) - 1}, the model's vocabulary", "prompt"
        )
    _check_no_media(ids, media)
    return text_stream(ids), tokenizer.decode(ids)


def _check_no_media(ids: Sequence[int], media: MediaSupport) -> None:
    if not set(media.placeholders.values()).isdisjoint(ids):
        raise InvalidRequestError(
            "the prompt holds the token that stands for a picture or a clip; send media as parts "
            "of messages",
            "prompt",
        )


def chat_stream(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    media: MediaSupport = TEXT_ONLY,
    tenant: str = "",
    bound: TextBound | None = None,
    tools: Tools | None = None,
) -> tuple[SegmentStream, str]:
    """The stream and the text of a chat, through the model's own template.

    Args:
        messages: as in OpenAI's API; content is text or a list of parts.
        media: what the model can take beside text.
        tenant: whose request it is.
        bound: of all texts together, before any is tokenised or a medium is decoded.
        tools: what the model may call. A template that does not know tools gets them, and calls
            and results in earlier messages, as Qwen's would write them.

    Raises:
        InvalidRequestError: no messages, a bad role or content, texts beyond the bound, a part that
            this model cannot take, or a model without a chat template.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message", "messages")
    if bound is not None:
        bound.check([*_texts(messages), *(tools.texts if tools else ())], "messages")
    reader = _Reader(tokenizer, media, tenant)
    if tools is not None:
        for i, text in enumerate(tools.texts):
            reader.check(text, f"tools[{i}]")
    plain: list[Mapping[str, Any]] = [
        reader.message(message, f"messages[{i}]") for i, message in enumerate(messages)
    ]
    if not reader.items and not any(text.strip() for text in reader.texts):
        raise InvalidRequestError("the messages are empty", "messages")
    if not tokenizer.chat_template:
        raise InvalidRequestError(
            "this model has no chat template; send a plain prompt instead", "messages"
        )
    offered = list(tools.offered) if tools else None
    if style_of(tokenizer.chat_template) is None:
        plain, offered = told_in_words(plain, tools), None
    try:
        text = tokenizer.apply_chat_template(
            plain, tools=offered, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like, jinja's errors among them
        raise InvalidRequestError(
            f"the model's chat template refuses these messages: {error}", "messages"
        ) from error
    for token, written in media.spelled.items():
        text = text.replace(token, written)
    ids = _token_ids(text, tokenizer, "messages", add_special_tokens=False)
    try:
        stream = media_stream(ids, reader.items, media.placeholders, media.mrope)
    except ValueError as error:
        raise InvalidRequestError(
            f"the model's chat template has no place for these media: {error}", "messages"
        ) from error
    return stream, "\n".join(reader.texts)


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """What will be tokenised, as far as it is text; the rest is refused later."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            yield content
        elif isinstance(content, Sequence):
            texts = (part.get("text") for part in content if isinstance(part, Mapping))
            yield from (text for text in texts if isinstance(text, str))
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        for call in calls if isinstance(calls, Sequence) else ():
            function = call.get("function") if isinstance(call, Mapping) else None
            arguments = function.get("arguments") if isinstance(function, Mapping) else None
            if isinstance(arguments, str):
                yield arguments


def _token_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, where: str, **options: bool
) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell it; tokenizers cannot take it
        raise InvalidRequestError(f"half a surrogate pair is no text: {error}", where) from error
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    if not ids:
        raise InvalidRequestError("the prompt has no tokens", where)
    return ids


class _Reader:
    """Turns messages into what a chat template takes; collects their texts and media."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, media: MediaSupport, tenant: str
    ) -> None:
        self.texts: list[str] = []
        self.items: list[MediaItem] = []
        self._adapters = media.adapters
        self._tenant = tenant
        places = tokenizer.convert_ids_to_tokens(list(media.placeholders.values()))
        self._reserved = {*places, *media.spelled}

    def message(self, message: Message, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"{where} needs a role and content", where)
        role, content = message["role"], message.get("content")
        more: dict[str, Any] = {}
        if (calls := message.get("tool_calls")) is not None and calls != []:
            more["tool_calls"] = earlier_calls(calls, f"{where}.tool_calls")
            self.check(json.dumps(more, ensure_ascii=False), f"{where}.tool_calls")
            content = content or ""
        if isinstance(told := message.get("tool_call_id"), str):
            self.check(told, f"{where}.tool_call_id")
            more["tool_call_id"] = told
        if isinstance(content, str):
            self.check(content, f"{where}.content")
            self.texts.append(content)
            return {"role": role, "content": content, **more}
        if not isinstance(content, Sequence) or not content:
            raise InvalidRequestError(f"{where}.content must be text or a list of parts", where)
        parts = [self._part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        self.texts.append(text)
        only_text = all(part["type"] == "text" for part in parts)
        return {"role": role, "content": text if only_text else parts, **more}

    def _part(self, part: Any, where: str) -> dict[str, str]:
        if not isinstance(part, Mapping):
            raise InvalidRequestError(f"{where} must be an object with a type", where)
        if part.get("type") == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise InvalidRequestError(f"{where} is a text part without text", where)
            self.check(text, f"{where}.text")
            return {"type": "text", "text": text}
        item = self._adapters.read(part, where, self._tenant)
        self.items.append(item)
        return {"type": item.modality.value, item.modality.value: ""}

    def check(self, text: str, where: str) -> None:
        """Raises InvalidRequestError: the text holds a token that stands for a medium."""
        # The tokenizer would take it for the real one, and a picture would stand in its place.
        for token in self._reserved:
            if token in text:
                raise InvalidRequestError(
                    f"{where} holds {token}, which this model's prompts keep for media", where
                )
