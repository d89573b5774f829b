"""Video: frames, resized as the model does it, hashed group by group.

The model makes one picture of every two frames, and no picture sees another one. So each is an item
of its own: a video without its oldest seconds still has the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities import data_url
from kvshare_mm.modalities.data_url import MAX_FRAMES
from kvshare_mm.modalities.decoding import QUICK_S, Decoder, InProcess
from kvshare_mm.modalities.hashing import Seen, content_digest, row_hashes, settings_digest
from kvshare_mm.modalities.image import normalized_patches
from kvshare_mm.modalities.picture_file import Picture, load_picture
from kvshare_mm.modalities.sources import MediaSources, given
from kvshare_mm.stream import MediaItem, Modality

_FPS = 24.0  # transformers' own, where nobody says it
_LEAST_FPS, _MOST_FPS = 0.01, 1000.0
_SEND_FRAMES = "send a list of frames, or data:video/jpeg;base64,<frame>,<frame>"

# Frames as they are sent: files' content, or pictures that are open.
Frames = Sequence[bytes | Image.Image]


@dataclass(frozen=True, slots=True)
class _Known:
    """What frames turned out to hold.

    Attributes:
        digests: of each group.
        grid: rows and columns of a group's positions.
        times: rotary time of each group.
        size: of a frame, for people.
    """

    digests: tuple[str, ...]
    grid: tuple[int, int]
    times: tuple[int, ...]
    size: str
    notes: tuple[str, ...]


class VideoAdapter:
    """Parts of type ``video`` and ``video_url`` for models with Qwen2-VL's video processor.

    Two groups of frames are the same if all their pixels are after the model's own resize, and
    their video is as fast.

    Args:
        processor: transformers' video processor of the model.
        sources: reads files and URLs.
        max_pixels: of all frames of a video together, as they are sent.
        decoder: of files that were not seen before.
        tokens_per_second: by how many positions a second moves what is seen; None: groups stand
            one behind the other, however fast they are.
    """

    modality = Modality.VIDEO
    part_types = frozenset({"video", "video_url"})

    def __init__(
        self,
        processor: Any,
        sources: MediaSources,
        max_pixels: int = 50_000_000,
        decoder: Decoder | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        self._processor = processor
        self._sources = sources
        self._max_pixels = max_pixels
        self._decoder = decoder or InProcess()
        self._tokens_per_second = tokens_per_second
        self._settings = settings_digest(processor)
        self._seen: Seen[_Known] = Seen(256)  # one may have hundreds of digests

    def read(self, part: Mapping[str, Any], where: str, tenant: str) -> MediaItem:
        """The first group of a video's frames, with the others behind it; see `ModalityAdapter`."""
        field = f"{where}.{part['type']}"
        frames, fps = self._frames(part, field), _fps(part.get("fps"), f"{where}.fps")
        name = _name(frames, fps)
        known = None if name is None else self._seen.get(name, tenant)
        if known is not None:
            loaded = cache(lambda: self._patches(self._pictures(frames, field, load_picture)))
            return self._item(known, frames, field, loaded)
        pictures = self._pictures(frames, field, self._decoded)
        patches = self._patches(pictures)
        known = self._known(pictures, patches, fps)
        # One that takes long is decoded again here, not later by the thread that runs the model.
        if name is not None and sum(picture.cpu_s for picture in pictures) <= QUICK_S:
            self._seen.put(name, tenant, known)
        return self._item(known, frames, field, lambda: patches)

    def _frames(self, part: Mapping[str, Any], field: str) -> Frames:
        sent = given(part, field)
        if part["type"] == "video_url" and isinstance(sent, str):
            sent = data_url.frames(sent, self._sources.max_bytes, field)
        if not isinstance(sent, list | tuple):
            kind = type(sent).__name__
            raise InvalidRequestError(
                f"{field} is a {kind}, and video files are not read: {_SEND_FRAMES}", field
            )
        if not 0 < len(sent) <= MAX_FRAMES:
            raise InvalidRequestError(
                f"{field} has {len(sent)} frames; it must have 1 to {MAX_FRAMES}", field
            )
        frames: list[bytes | Image.Image] = []
        most = left = self._sources.max_bytes
        for i, frame in enumerate(sent):
            if isinstance(frame, Image.Image):
                frames.append(frame)
                continue
            content = self._sources.read(frame, f"{field}[{i}]")
            frames.append(content)
            left -= len(content)
            if left < 0:
                raise InvalidRequestError(
                    f"{field} has more than {most} bytes, the most that is taken", field
                )
        return frames

    def _decoded(self, frame: bytes | Image.Image, where: str, max_pixels: int) -> Picture:
        if isinstance(frame, bytes):
            return self._decoder.picture(frame, where, max_pixels)
        return load_picture(frame, where, max_pixels)

    def _pictures(
        self,
        frames: Frames,
        field: str,
        decoded: Callable[[bytes | Image.Image, str, int], Picture],
    ) -> list[Picture]:
        """The frames in RGB, all of one size; no more pixels are decoded than may be."""
        first = decoded(frames[0], f"{field}[0]", self._max_pixels)
        width, height = first.image.size
        # Small ones are made larger.
        least = self._processor.size.get("shortest_edge") or 0
        if len(frames) * max(width * height, least) > self._max_pixels:
            seen = f", each seen as {least} pixels" if width * height < least else ""
            raise InvalidRequestError(
                f"{field} has {len(frames)} frames of {width}x{height}{seen}; at most "
                f"{self._max_pixels / 1e6:g} million pixels are taken in all of them",
                field,
            )
        pictures = [first]
        for i, frame in enumerate(frames[1:], 1):
            where = f"{field}[{i}]"
            picture = decoded(frame, where, self._max_pixels)
            if picture.image.size != first.image.size:
                found = "{}x{}".format(*picture.image.size)
                raise InvalidRequestError(
                    f"{where} is {found}, and the first frame {width}x{height}", where
                )
            pictures.append(picture)
        return pictures

    def _patches(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """``[groups, rows, columns, pixels]`` uint8: of each group its patches, those that become
        one position behind each other."""
        width, height = pictures[0].image.size
        # Of pictures that are one or three pixels high, the processor would take these for colours.
        frames = np.empty((len(pictures), 3, height, width), dtype=np.uint8)
        for frame, picture in zip(frames, pictures, strict=True):
            frame[:] = np.asarray(picture.image).transpose(2, 0, 1)
        # Not rescaled and not normalized: the pixels themselves, as uint8.
        made = self._processor(
            videos=[torch.from_numpy(frames)],
            input_data_format="channels_first",
            do_rescale=False,
            do_normalize=False,
            do_sample_frames=False,
            return_tensors="pt",
        )
        patches: torch.Tensor = made["pixel_values_videos"].to(torch.uint8)
        groups, rows, columns = (int(n) for n in made["video_grid_thw"][0])
        return patches.view(groups, rows, columns, -1)

    def _known(self, pictures: Sequence[Picture], patches: torch.Tensor, fps: float) -> _Known:
        groups, rows, columns, _ = patches.shape
        merge, size = self._processor.merge_size, self._processor.patch_size
        # As transformers has it: in float32, and rounded down when all is multiplied.
        step = torch.tensor(self._processor.temporal_patch_size / fps)
        rate = self._tokens_per_second
        step = torch.tensor(1.0) if rate is None else rate * step
        times = (torch.arange(groups) * step).long()
        grid = rows // merge, columns // merge
        hashes = row_hashes(patches.reshape(groups * grid[0] * grid[1], -1).numpy())
        width, height = pictures[0].image.size
        return _Known(
            tuple(
                content_digest(group, *grid, float(step), self._settings)
                for group in hashes.reshape(groups, -1)
            ),
            grid,
            tuple(times.tolist()),
            f"{width}x{height}, seen as {columns * size}x{rows * size}",
            tuple(dict.fromkeys(note for picture in pictures for note in picture.notes)),
        )

    def _item(
        self, known: _Known, frames: Frames, field: str, patches: Callable[[], torch.Tensor]
    ) -> MediaItem:
        count, size = len(known.digests), self._processor.temporal_patch_size

        def group(i: int) -> MediaItem:
            place = f"{field}[{i * size}]"
            return MediaItem(
                self.modality,
                known.digests[i],
                known.grid[0] * known.grid[1],
                known.grid,
                f"video {i + 1} of {count}, {known.size}",
                lambda: self._inputs(patches()[i]),
                content=lambda: load_picture(frames[i * size], place, self._max_pixels).image,
                time=known.times[i] if i else None,
            )

        first, *behind = map(group, range(count))
        return replace(first, notes=known.notes, behind=tuple(behind))

    def _inputs(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the processor would have made of one group."""
        rows, columns, _ = patches.shape
        return {
            "pixel_values_videos": normalized_patches(self._processor, patches.flatten(0, 1)),
            "video_grid_thw": torch.tensor([[1, rows, columns]]),
        }


def _fps(given: object, field: str) -> float:
    """Frames a second. Raises InvalidRequestError."""
    if given is None:
        return _FPS
    number = isinstance(given, int | float) and not isinstance(given, bool)
    # A whole number may be too large to be any other.
    if not number or not _LEAST_FPS <= given <= _MOST_FPS:  # type: ignore[operator]
        # Not shown: it may be of any length, and Python writes no number of thousands of digits.
        what = "" if number else f", and is a {type(given).__name__}"
        raise InvalidRequestError(
            f"{field} must be a number from {_LEAST_FPS:g} to {_MOST_FPS:g}{what}", field
        )
    return float(given)  # type: ignore[arg-type]


def _name(frames: Frames, fps: float) -> bytes | None:
    """Names files and how fast they follow one another; None: some are open pictures."""
    digests = [hashlib.blake2b(f, digest_size=32).digest() for f in frames if isinstance(f, bytes)]
    return np.float64(fps).tobytes() + b"".join(digests) if len(digests) == len(frames) else None
