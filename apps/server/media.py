"""Media of a chat: fetched here, within limits, before the engine sees the messages.

Only four kinds of parts pass. The engine takes more, paths on this machine among them; those are
for its own users, not for the network's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from kvshare_mm.apps.server.json_bodies import LARGE
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities import data_url
from kvshare_mm.modalities.fetch import MediaFetcher

_PASSED = ("tool_call_id", "tool_calls")
_SOUND = ("wav", "mp3", "flac")


async def resolved(
    messages: Sequence[Mapping[str, Any]],
    fetcher: MediaFetcher,
    max_media: int,
    aside: Callable[..., Awaitable[Any]] = asyncio.to_thread,
) -> list[dict[str, Any]]:
    """Messages whose media are bytes, in parts of the type that they came in.

    Args:
        messages: as in OpenAI's API.
        fetcher: gets what URLs name.
        max_media: most pictures, clips and videos.
        aside: runs a function where it holds nobody up.

    Raises:
        InvalidRequestError: a part that is not text, image_url, input_audio or video_url, is
            malformed, too large, or cannot be fetched; its field is the part's place.
    """
    made: list[dict[str, Any]] = []
    fetches: list[tuple[dict[str, Any], str, str]] = []
    num_media = 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = "system" if message["role"] == "developer" else message["role"]
        if message.get("function_call"):
            raise InvalidRequestError("send tool_calls instead", f"{where}.function_call")
        content, told = message.get("content"), {"role": role}
        told |= {name: message[name] for name in _PASSED if message.get(name)}
        if not content and message.get("tool_calls"):
            content = ""
        if content is None:
            raise InvalidRequestError(f"{where} has no content", f"{where}.content")
        if isinstance(content, str):
            made.append({**told, "content": content})
            continue
        parts: list[dict[str, Any]] = []
        for j, part in enumerate(content):
            place = f"{where}.content[{j}]"
            kind = part.get("type")
            if kind == "text":
                parts.append({"type": "text", "text": _text(part.get("text"), place)})
                continue
            num_media += 1
            if num_media > max_media:
                raise InvalidRequestError(
                    f"more than {max_media} pictures, clips and videos", place
                )
            if kind in ("image_url", "video_url"):
                seen = {name: part[name] for name in ("type", "fps") if name in part}
                fetches.append((seen, _url(part.get(kind), kind, place), place))
                parts.append(seen)
            elif kind == "input_audio":
                parts.append(_sound(part.get("input_audio"), place, fetcher.policy.max_bytes))
            else:
                raise InvalidRequestError(
                    f"{place} is of type {kind!r}; text, image_url, input_audio and video_url are "
                    "taken",
                    place,
                )
        made.append({**told, "content": parts})
    contents = await asyncio.gather(
        *(_fetched(fetcher, url, part["type"], at, aside) for part, url, at in fetches)
    )
    for (part, _, _), content in zip(fetches, contents, strict=True):
        part[part["type"]] = content
    return made


async def _fetched(
    fetcher: MediaFetcher,
    url: str,
    kind: str,
    place: str,
    aside: Callable[..., Awaitable[Any]],
) -> bytes | list[bytes]:
    """A picture, or the frames of a video."""
    place = f"{place}.{kind}"
    if kind == "video_url":
        frames: list[bytes] = await aside(data_url.frames, url, fetcher.policy.max_bytes, place)
        return frames
    content: bytes
    try:
        # A URL that long holds the medium itself.
        if len(url) > LARGE:
            content = await aside(fetcher.fetch, url)
        else:
            content = await fetcher.afetch(url)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{place}: {error}", place) from error
    if not content:
        raise InvalidRequestError(f"{place}: there is nothing at this URL", place)
    return content


def _text(text: object, place: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(f"{place}.text must be text", f"{place}.text")
    return text


def _url(value: object, kind: str, place: str) -> str:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str):
        raise InvalidRequestError(f"{place}.{kind}.url must be a URL", f"{place}.{kind}")
    return url


def _sound(value: object, place: str, max_bytes: int) -> dict[str, Any]:
    place = f"{place}.input_audio"
    if not isinstance(value, Mapping) or not isinstance(value.get("data"), str):
        raise InvalidRequestError(f"{place} needs data, in base64", place)
    if value.get("format") not in _SOUND:
        raise InvalidRequestError(f"{place}.format must be one of {', '.join(_SOUND)}", place)
    # Four characters stand for three bytes: known before it is decoded.
    if len(value["data"]) > max_bytes // 3 * 4 + 4:
        raise InvalidRequestError(f"{place} has more than {max_bytes} bytes", place)
    sound = {"data": value["data"], "format": value["format"]}
    return {"type": "input_audio", "input_audio": sound}
