"""The prompt as one stream of positions, each with a 64-bit alignment key.

Two positions may share KV only if their keys are equal. A text position's key is its token id;
a media position's key is a hash of (content hash, offset inside the item) with the top bit set, so
a diff over keys matches pictures and sound only when they are exactly the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import xxhash

_MEDIA_BIT = 1 << 63


class Modality(StrEnum):
    TEXT = "text"
    IMAGE = "image"
    AUDIO = "audio"


@dataclass(frozen=True, slots=True)
class Segment:
    """A maximal span ``[start, end)`` of the stream in one modality.

    Attributes:
        content_hash: 64-bit hash of the media item; 0 for text.
    """

    modality: Modality
    start: int
    end: int
    content_hash: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"empty or negative segment [{self.start}, {self.end})")


@dataclass(frozen=True, slots=True)
class SegmentStream:
    """A whole prompt.

    Attributes:
        token_ids: ``[N]`` int64, what the model's embedding table is asked for.
        keys: ``[N]`` uint64 alignment keys.
        segments: spans in order that tile ``[0, N)``.
    """

    token_ids: np.ndarray
    keys: np.ndarray
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.keys.shape or self.token_ids.ndim != 1:
            raise ValueError("token_ids and keys must be vectors of one length")
        ends = [0, *(s.end for s in self.segments)]
        starts = [*(s.start for s in self.segments), len(self.token_ids)]
        if ends != starts:
            raise ValueError("segments must tile the stream")

    def __len__(self) -> int:
        return len(self.token_ids)


def text_stream(token_ids: Sequence[int] | np.ndarray) -> SegmentStream:
    """A stream of text only: one segment, keys equal to the token ids."""
    ids = np.array(token_ids, dtype=np.int64)
    if ids.size and ids.min() < 0:
        raise ValueError("a token id is negative")
    return SegmentStream(ids, ids.astype(np.uint64), (Segment(Modality.TEXT, 0, len(ids)),))


def media_keys(content_hash: int, length: int) -> np.ndarray:
    """Keys of a media item's `length` positions: ``[length]`` uint64, top bit set."""
    prefix = content_hash.to_bytes(8, "little")
    return np.array(
        [
            xxhash.xxh3_64_intdigest(prefix + i.to_bytes(4, "little")) | _MEDIA_BIT
            for i in range(length)
        ],
        dtype=np.uint64,
    )
