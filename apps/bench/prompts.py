"""Prompts of benchmarks: pairs of similar ones, and as the model is asked them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from kvshare_mm.apps.bench.jsonl import read_jsonl, read_text
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.chat import TEXT_ONLY, MediaSupport, chat_stream, prompt_stream
from kvshare_mm.errors import ConfigError
from kvshare_mm.stream import SegmentStream

Text = str | list[dict[str, Any]]

# Pairs of each ten that constants may be chosen on; the others are for checking.
_FITTED_OF_TEN = 6


def is_fitted_to(pair_id: str) -> bool:
    """Whether a pair belongs to the part that constants may be chosen on."""
    return xxhash.xxh3_64_intdigest(pair_id.encode()) % 10 < _FITTED_OF_TEN


def read_pairs(
    path: Path, limit: int | None = None, *, held_out: bool = False
) -> list[dict[str, Any]]:
    """Pairs of a JSON Lines file: ``{"id", "donor", "target", "reference"?}``.

    Donor and target are texts, or messages whose media may be paths relative to the file.

    Args:
        limit: the first so many; None for all.
        held_out: only those that no constant was chosen on (`is_fitted_to`).

    Raises:
        ConfigError: no such file, or a line that is not a pair; says which.
    """
    pairs = []
    for number, pair in enumerate(read_jsonl(path, "donor", "target"), 1):
        if not pair["donor"] or not pair["target"]:
            raise ConfigError(f"{path}: pair {number} has an empty donor or target")
        sides = {side: with_media_paths(pair[side], path.parent) for side in ("donor", "target")}
        pairs.append({"id": str(number), **pair, **sides})
    if held_out:
        pairs = [pair for pair in pairs if not is_fitted_to(str(pair["id"]))]
    return pairs[:limit]


def with_media_paths(prompt: Any, folder: Path) -> Any:
    """Messages with relative paths of media taken from `folder`; all else as it is."""
    if isinstance(prompt, list):
        return [with_media_paths(entry, folder) for entry in prompt]
    if not isinstance(prompt, dict):
        return prompt
    moved = dict(prompt)
    if isinstance(prompt.get("content"), list):
        moved["content"] = with_media_paths(prompt["content"], folder)
    for kind in ("image", "audio"):
        if prompt.get("type") == kind and isinstance(prompt.get(kind), str):
            moved[kind] = _from(folder, prompt[kind])
    if prompt.get("type") == "image_url":
        place = prompt.get("image_url")
        if isinstance(place, dict) and isinstance(place.get("url"), str):
            moved["image_url"] = {**place, "url": _from(folder, place["url"])}
        elif isinstance(place, str):
            moved["image_url"] = _from(folder, place)
    return moved


def _from(folder: Path, place: str) -> str:
    return place if place.startswith(("http:", "https:", "data:")) else str(folder / place)


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
    """A prompt as the rig's model is asked it; as `prompt`, with media."""
    return prompt(text, rig.loaded.tokenizer, chat, rig.media)


def prompt(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool = True,
    media: MediaSupport = TEXT_ONLY,
) -> SegmentStream:
    """A prompt as a model is asked it.

    Args:
        text: a prompt, or the messages of a chat.
        chat: a text becomes a user message, if the model has a chat template.

    Raises:
        InvalidRequestError: the prompt is empty or no text.
    """
    if isinstance(text, str):
        if not (chat and tokenizer.chat_template):
            return prompt_stream(text, tokenizer)[0]
        text = [{"role": "user", "content": text}]
    return chat_stream(text, tokenizer, media)[0]
