"""Pictures for models that see them in tiles of one size (InternVL), or as one (Gemma 3)."""

from __future__ import annotations

from typing import Any

import torch

from kvshare_mm.modalities.decoding import Decoder
from kvshare_mm.modalities.hashing import content_digest, row_hashes
from kvshare_mm.modalities.image import ImageAdapter, Known, normalized
from kvshare_mm.modalities.picture_file import Picture
from kvshare_mm.modalities.sources import MediaSources


class TiledImageAdapter(ImageAdapter):
    """Parts of type ``image_url`` and ``image`` for models whose tiles take as many positions each.

    Two pictures are the same if all their tiles have the same pixels.

    Args:
        processor: transformers' processor of the model.
        options: what it tells its image processor about tiles.
    """

    def __init__(
        self,
        processor: Any,
        sources: MediaSources,
        max_pixels: int = 50_000_000,
        decoder: Decoder | None = None,
        **options: bool,
    ) -> None:
        super().__init__(processor.image_processor, sources, max_pixels, decoder)
        self._options = options
        self._tile_tokens = int(processor.image_seq_length)

    def _made(self, picture: Picture) -> tuple[Any, Known]:
        width, height = picture.image.size
        # Not rescaled and not normalized: the pixels themselves, as uint8.
        made = self._processor(
            images=[picture.image],
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
            **self._options,
        )
        tiles: torch.Tensor = made["pixel_values"].to(torch.uint8)
        rows = tiles.reshape(len(tiles), 1, -1).numpy()
        size = f"{tiles.shape[3]}x{tiles.shape[2]}"
        known = Known(
            content_digest(row_hashes(rows), len(tiles), 1, self._settings),
            len(tiles) * self._tile_tokens,
            None,
            f"{width}x{height}, seen as {size if len(tiles) == 1 else f'{len(tiles)} tiles'}",
            picture.notes,
        )
        return tiles, known

    def _inputs(self, loaded: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values": normalized(self._processor, loaded)}
