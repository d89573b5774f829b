"""Pictures: decoded, resized as the model does it, hashed patch by patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.decoding import QUICK_S, Decoder, InProcess
from kvshare_mm.modalities.hashing import Seen, content_digest, row_hashes, settings_digest
from kvshare_mm.modalities.picture_file import Picture, load_picture
from kvshare_mm.modalities.sources import MediaSources, given
from kvshare_mm.stream import MediaItem, Modality


@dataclass(frozen=True, slots=True)
class Known:
    """What a file turned out to hold: see `MediaItem`."""

    digest: str
    length: int
    grid: tuple[int, int] | None
    label: str
    notes: tuple[str, ...]


class ImageAdapter:
    """Parts of type ``image_url`` and ``image`` for models with Qwen2-VL's image processor.

    Two pictures are the same if every merged patch, the one the model makes a token of, has the
    same pixels after the model's own resize; the file that they came in does not matter.

    Args:
        processor: transformers' image processor of the model.
        sources: reads files and URLs.
        max_pixels: of a picture as it is sent.
        decoder: of files that were not seen before.
    """

    modality = Modality.IMAGE
    part_types = frozenset({"image_url", "image"})

    def __init__(
        self,
        processor: Any,
        sources: MediaSources,
        max_pixels: int = 50_000_000,
        decoder: Decoder | None = None,
    ) -> None:
        self._processor = processor
        self._sources = sources
        self._max_pixels = max_pixels
        self._decoder = decoder or InProcess()
        self._settings = settings_digest(processor)
        self._seen: Seen[Known] = Seen()

    def read(self, part: Mapping[str, Any], where: str, tenant: str) -> MediaItem:
        source, field = self._source(part, where)
        if isinstance(source, bytes):
            known = self._seen.get(source, tenant)
            if known is not None:
                return self._item(
                    known,
                    source,
                    field,
                    lambda: self._inputs(self._made(self._here(source, field))[0]),
                )
            picture = self._decoder.picture(source, field, self._max_pixels)
        else:
            picture = self._here(source, field)
        patches, known = self._made(picture)
        # One that takes long is decoded again here, not later by the thread that runs the model.
        if isinstance(source, bytes) and picture.cpu_s <= QUICK_S:
            self._seen.put(source, tenant, known)
        return self._item(known, source, field, lambda: self._inputs(patches))

    def _source(self, part: Mapping[str, Any], where: str) -> tuple[bytes | Image.Image, str]:
        kind = part["type"]
        field = f"{where}.{kind}"
        source = given(part, field)
        if kind == "image" and isinstance(source, Image.Image):
            return source, field
        # Bytes: the server has fetched it, and errors name the part as its client sent it.
        if kind == "image_url" and not isinstance(source, str | bytes):
            raise InvalidRequestError(f"{field} must be a URL or an object with a url", field)
        return self._sources.read(source, field), field

    def _here(self, source: bytes | Image.Image, field: str) -> Picture:
        """Decoded in this process: what was decoded before, or is open already."""
        return load_picture(source, field, self._max_pixels)

    def _made(self, picture: Picture) -> tuple[Any, Known]:
        """What `_inputs` needs of a picture, and what is known of it then."""
        width, height = picture.image.size
        # Not rescaled and not normalized: the pixels themselves, as uint8.
        made = self._processor(
            images=[picture.image], do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        patches: torch.Tensor = made["pixel_values"].to(torch.uint8)
        _, rows, columns = (int(n) for n in made["image_grid_thw"][0])
        merge = self._processor.merge_size
        grid = rows // merge, columns // merge
        hashes = self.patch_hashes(patches)
        size = self._processor.patch_size
        known = Known(
            content_digest(hashes, *grid, self._settings),
            grid[0] * grid[1],
            grid,
            f"{width}x{height}, seen as {columns * size}x{rows * size}",
            picture.notes,
        )
        return (patches, (rows, columns)), known

    def patch_hashes(self, patches: torch.Tensor) -> np.ndarray:
        """Hash of every merged patch.

        Args:
            patches: ``[num_patches, channels * frames * size * size]`` uint8, those of a merged
                patch behind each other.

        Returns:
            ``[num_patches / merge**2, 32]`` uint8.
        """
        # A still picture is repeated as many times as the model takes frames: one is enough.
        frames = self._processor.temporal_patch_size
        once = patches.view(len(patches), 3, frames, -1)[:, :, 0]
        return row_hashes(once.reshape(-1, self._processor.merge_size**2, once[0].numel()).numpy())

    def _item(
        self, known: Known, source: bytes | Image.Image, field: str, inputs: Any
    ) -> MediaItem:
        return MediaItem(
            self.modality,
            known.digest,
            known.length,
            known.grid,
            known.label,
            inputs,
            known.notes,
            lambda: self._here(source, field).image,
        )

    def _inputs(self, loaded: Any) -> dict[str, torch.Tensor]:
        patches, (rows, columns) = loaded
        return {
            "pixel_values": normalized_patches(self._processor, patches),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }


def normalized(processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What a processor of transformers would have made of pixels: it works pixel by pixel.

    Args:
        pixels: ``[..., 3, height, width]`` uint8.
    """
    made: torch.Tensor = processor.rescale_and_normalize(
        pixels,
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        processor.image_mean,
        processor.image_std,
    )
    return made.float()


def normalized_patches(processor: Any, patches: torch.Tensor) -> torch.Tensor:
    """`normalized`, of patches as Qwen2-VL's processors lay them out, uint8 ``[n, pixels]``."""
    pixels = patches.view(len(patches), 3, -1, processor.patch_size)
    return normalized(processor, pixels).reshape(len(patches), -1)
