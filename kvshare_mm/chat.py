"""Prompts and chat messages to token streams, with every mistake caught at the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.stream import SegmentStream, text_stream

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


def prompt_stream(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[SegmentStream, str]:
    """The stream and the text of a prompt given as text or as token ids.

    Raises:
        InvalidRequestError: empty, not text, or ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InvalidRequestError("the prompt is empty", "prompt")
        return _encoded(prompt, tokenizer, "prompt"), prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InvalidRequestError("a prompt is text or a list of token ids", "prompt")
    ids = [t for t in prompt if isinstance(t, int) and not isinstance(t, bool)]
    if len(ids) != len(prompt):
        raise InvalidRequestError("a prompt is text or a list of token ids", "prompt")
    if not ids:
        raise InvalidRequestError("the prompt is empty", "prompt")
    if min(ids) < 0 or max(ids) >= len(tokenizer):
        raise InvalidRequestError(
            f"token ids must lie in 0..{len(tokenizer) - 1}, the model's vocabulary", "prompt"
        )
    return text_stream(ids), tokenizer.decode(ids)


def chat_stream(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[SegmentStream, str]:
    """The stream and the text of a chat, through the model's own template.

    Args:
        messages: as in OpenAI's API; content is text or a list of parts.

    Raises:
        InvalidRequestError: no messages, a bad role or content, a part that this model cannot
            take, or a model without a chat template.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message", "messages")
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not any(message["content"].strip() for message in plain):
        raise InvalidRequestError("the messages are empty", "messages")
    if not tokenizer.chat_template:
        raise InvalidRequestError(
            "this model has no chat template; send a plain prompt instead", "messages"
        )
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like, jinja's errors among them
        raise InvalidRequestError(
            f"the model's chat template refuses these messages: {error}", "messages"
        ) from error
    stream = _encoded(text, tokenizer, "messages", add_special_tokens=False)
    return stream, "\n".join(message["content"] for message in plain)


def _encoded(
    text: str, tokenizer: PreTrainedTokenizerBase, field: str, **options: bool
) -> SegmentStream:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell it; tokenizers cannot take it
        raise InvalidRequestError(f"half a surrogate pair is no text: {error}", field) from error
    ids = tokenizer(text, **options)["input_ids"]
    if not ids:
        raise InvalidRequestError("the prompt has no tokens", field)
    return text_stream(ids)


def _plain(message: Message, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{where} needs a role and content", where)
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, Sequence) or not content:
        raise InvalidRequestError(f"{where}.content must be text or a list of parts", where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"{where} has a part of type {kind!r}; this model takes text parts only", where
            )
        texts.append(part["text"])
    return {"role": message["role"], "content": "".join(texts)}
