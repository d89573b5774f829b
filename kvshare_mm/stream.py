"""The prompt as one stream of positions, each with a 64-bit alignment key.

Two positions may share KV only if their keys are equal. A text position's key is its token id;
a media position's key is made of the item's whole digest and the offset inside it, with the top bit
set, so a diff over keys matches pictures and sound only when they are exactly the same.

Positions are what the model's rotary embedding is told. They are the index in the stream, unless a
model with M-RoPE sees a picture: then each has a time, a row and a column, and a picture of many
tokens moves what follows it by its longer side only. A video is a row of pictures that begin at one
row and column, each with a time of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

# Keys of pictures and sound have it, those of tokens never.
MEDIA_BIT = 1 << 63


class Modality(StrEnum):
    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"


@dataclass(frozen=True, slots=True, eq=False)
class MediaItem:
    """One picture or clip of a prompt, decoded and hashed; of a video, the frames that the model
    makes one picture of.

    Attributes:
        digest: hex digits of a cryptographic hash over content and processor settings.
        length: positions it takes.
        grid: rows and columns of a picture's positions; None for sound.
        label: its sizes, for people.
        inputs: makes what the model's encoder takes, by keyword. Called only if the encoder runs.
        notes: what was done to it that its sender may not expect.
        content: decodes it again: a picture in RGB, or (samples, samples a second).
        time: rotary time since the first picture of its video; None: it begins by itself.
        behind: pictures of the same video that follow it at the same placeholder.
    """

    modality: Modality
    digest: str
    length: int
    grid: tuple[int, int] | None
    label: str
    inputs: Callable[[], Mapping[str, Any]] = field(repr=False)
    notes: tuple[str, ...] = ()
    content: Callable[[], Any] | None = field(default=None, repr=False)
    time: int | None = None
    behind: tuple[MediaItem, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.length < 1 or (self.grid and self.grid[0] * self.grid[1] != self.length):
            raise ValueError(f"an item of grid {self.grid} cannot take {self.length} positions")

    @property
    def content_hash(self) -> int:
        """The first 64 bits of the digest, to show and to search by; it decides no reuse."""
        return int(self.digest[:16], 16)


@dataclass(frozen=True, slots=True)
class Segment:
    """A maximal span ``[start, end)`` of the stream in one modality.

    Attributes:
        content_hash: first 64 bits of the media item's digest; 0 for text.
        label: sizes of the media item, for people.
    """

    modality: Modality
    start: int
    end: int
    content_hash: int = 0
    label: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"empty or negative segment [{self.start}, {self.end})")


@dataclass(frozen=True, slots=True)
class SegmentStream:
    """A whole prompt.

    Attributes:
        token_ids: ``[N]`` int64, what the model's embedding table is asked for.
        align_keys: ``[N]`` uint64 alignment keys.
        segments: spans in order that tile ``[0, N)``.
        items: what stands in the segments that are not text, in order.
        positions: ``[3, N]`` int64 rotary positions (time, row, column); None: the index.
    """

    token_ids: np.ndarray
    align_keys: np.ndarray
    segments: tuple[Segment, ...]
    items: tuple[MediaItem, ...] = ()
    positions: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.align_keys.shape or self.token_ids.ndim != 1:
            raise ValueError("token_ids and keys must be vectors of one length")
        ends = [0, *(s.end for s in self.segments)]
        starts = [*(s.start for s in self.segments), len(self.token_ids)]
        if ends != starts:
            raise ValueError("segments must tile the stream")
        if self.positions is not None and self.positions.shape != (3, len(self.token_ids)):
            raise ValueError("positions must be [3, N]")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def media(self) -> tuple[Segment, ...]:
        """The segments that are not text."""
        return tuple(s for s in self.segments if s.modality is not Modality.TEXT)

    @property
    def pictures(self) -> np.ndarray | None:
        """``[N]`` bool: positions that are pictures; None: none are."""
        seen = (Modality.IMAGE, Modality.VIDEO)
        pictures = [s for s in self.segments if s.modality in seen]
        if not pictures:
            return None
        mask = np.zeros(len(self), dtype=bool)
        for segment in pictures:
            mask[segment.start : segment.end] = True
        return mask

    @property
    def rope_delta(self) -> int:
        """Rotary position minus index of whatever is written behind this stream."""
        if self.positions is None:
            return 0
        # A video may end later than the text that follows it.
        text = self.segments[-1].modality is Modality.TEXT
        last = self.positions[:, -1] if text else self.positions
        return int(last.max()) + 1 - len(self)

    def positions_to(self, length: int) -> np.ndarray | None:
        """``[3, length]`` positions of the stream and of the text written behind it, or None."""
        if self.positions is None:
            return None
        behind = np.arange(len(self), length) + self.rope_delta
        return np.hstack((self.positions, np.tile(behind, (3, 1))))


def text_stream(token_ids: Sequence[int] | np.ndarray) -> SegmentStream:
    """A stream of text only: one segment, keys equal to the token ids."""
    ids = np.array(token_ids, dtype=np.int64)
    if ids.size and ids.min() < 0:
        raise ValueError("a token id is negative")
    return SegmentStream(ids, ids.astype(np.uint64), (Segment(Modality.TEXT, 0, len(ids)),))


def media_stream(
    token_ids: Sequence[int],
    items: Sequence[MediaItem],
    placeholders: Mapping[Modality, int],
    mrope: bool,
) -> SegmentStream:
    """The stream of a prompt whose media stand in it as one placeholder token each.

    Args:
        token_ids: the prompt.
        items: its media, those of each modality in the order of their placeholders; of a video its
            first picture, with the others behind it.
        placeholders: token id by modality.
        mrope: the model's positions have three axes.

    Raises:
        ValueError: as many placeholders as items are not there.
    """
    ids = np.array(token_ids, dtype=np.int64)
    placed: dict[int, MediaItem] = {}
    for modality, token in placeholders.items():
        mine = [item for item in items if item.modality is modality]
        at = np.flatnonzero(ids == token)
        if len(at) != len(mine):
            raise ValueError(f"{len(at)} places for {len(mine)} items of {modality}")
        placed.update(zip(at.tolist(), mine, strict=True))
    if not placed:
        return text_stream(ids)
    tokens: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    segments: list[Segment] = []
    end = done = 0
    for index in [*sorted(placed), len(ids)]:
        if index > done:
            tokens.append(ids[done:index])
            keys.append(ids[done:index].astype(np.uint64))
            segments.append(Segment(Modality.TEXT, end, end + index - done))
            end += index - done
        for item in _pictures(placed[index]) if index in placed else ():
            tokens.append(np.full(item.length, ids[index]))
            keys.append(media_keys(item.digest, item.length))
            segments.append(
                Segment(item.modality, end, end + item.length, item.content_hash, item.label)
            )
            end += item.length
        done = index + 1
    in_order = tuple(item for index in sorted(placed) for item in _pictures(placed[index]))
    positions = None
    if mrope and any(item.grid for item in in_order):
        positions = mrope_positions(segments, in_order)
    return SegmentStream(
        np.concatenate(tokens), np.concatenate(keys), tuple(segments), in_order, positions
    )


def mrope_positions(segments: Sequence[Segment], items: Sequence[MediaItem]) -> np.ndarray:
    """Rotary positions of multimodal RoPE (arXiv 2409.12191): ``[3, N]`` int64.

    Text and sound count on, all three axes alike. A picture's tokens share one time and have their
    row and column, counted from where it begins; what follows begins behind the largest of them.
    All pictures of a video begin where its first does, and what follows begins behind their rows
    and columns, however late the last of them is: so transformers has it.
    """
    parts: list[np.ndarray] = []
    begin = start = 0
    left = iter(items)
    for segment in segments:
        item = None if segment.modality is Modality.TEXT else next(left)
        if item is None or item.grid is None:
            length = segment.end - segment.start
            parts.append(np.broadcast_to(np.arange(start, start + length), (3, length)))
            start += length
        else:
            begin = start if item.time is None else begin
            rows, columns = np.indices(item.grid).reshape(2, -1)
            parts.append(np.stack((np.full_like(rows, item.time or 0), rows, columns)) + begin)
            start = begin + max(item.grid)
    return np.hstack(parts).astype(np.int64, copy=False)


def _pictures(item: MediaItem) -> tuple[MediaItem, ...]:
    """What stands at an item's placeholder."""
    return (item, *item.behind)


def media_keys(digest: str, length: int) -> np.ndarray:
    """Keys of a media item's positions.

    They are the output of SHAKE128 (FIPS 202) over the whole digest, so what tells two items apart
    tells their keys apart, however many there are.

    Args:
        digest: the item's, hex digits.
        length: positions.

    Returns:
        ``[length]`` uint64, top bit set; a longer item's begin with a shorter one's.

    Raises:
        ValueError: `digest` is not hexadecimal.
    """
    stream = hashlib.shake_128(bytes.fromhex(digest)).digest(8 * length)
    return np.frombuffer(stream, dtype="<u8") | np.uint64(MEDIA_BIT)
