"""Prompts of benchmarks: pairs of similar ones, and as the model is asked them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvshare_mm.apps.bench.jsonl import read_jsonl, read_text
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.chat import chat_stream, prompt_stream
from kvshare_mm.errors import ConfigError
from kvshare_mm.stream import SegmentStream

Text = str | list[dict[str, Any]]


def read_pairs(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Pairs of a JSON Lines file: ``{"id", "donor", "target", "reference"?}``.

    Raises:
        ConfigError: no such file, or a line that is not a pair; says which.
    """
    pairs = []
    for number, pair in enumerate(read_jsonl(path, "donor", "target"), 1):
        if not pair["donor"] or not pair["target"]:
            raise ConfigError(f"{path}: pair {number} has an empty donor or target")
        pairs.append({"id": str(number), **pair})
    return pairs[:limit]


def read_prompts(path: Path) -> list[str]:
    """Texts of a JSON Lines file with a ``text`` field, or of a plain file, one a line.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line has no text.
    """
    if path.suffix == ".jsonl":
        return [str(record["text"]) for record in read_jsonl(path, "text")]
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"{path} has no prompts")
    return lines


def encode(rig: Rig, text: Text, chat: bool = True) -> SegmentStream:
    """A prompt as the model is asked it.

    Args:
        text: a prompt, or the messages of a chat.
        chat: a text becomes a user message, if the model has a chat template.

    Raises:
        InvalidRequestError: the prompt is empty or no text.
    """
    tokenizer = rig.loaded.tokenizer
    if isinstance(text, str):
        if not (chat and tokenizer.chat_template):
            return prompt_stream(text, tokenizer)[0]
        text = [{"role": "user", "content": text}]
    stream, _ = chat_stream(text, tokenizer, rig.media)
    return stream
