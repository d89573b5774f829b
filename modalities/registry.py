"""Which adapters a model has: one for every part of its processor that it has a placeholder for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvshare_mm.modalities.audio import AudioAdapter
from kvshare_mm.modalities.base import Adapters, ModalityAdapter
from kvshare_mm.modalities.decoding import Decoder
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.modalities.sources import MediaSources
from kvshare_mm.modalities.tiles import TiledImageAdapter
from kvshare_mm.modalities.video import VideoAdapter
from kvshare_mm.stream import Modality


def adapters_for(
    processor: Any,
    modalities: Iterable[Modality],
    sources: MediaSources,
    max_pixels: int,
    decoder: Decoder | None = None,
    tokens_per_second: float | None = None,
) -> Adapters:
    """The adapters of a multimodal model.

    Args:
        processor: transformers' processor of the model.
        modalities: what the model can take.
        sources: reads files and URLs.
        max_pixels: of a picture as it is sent, and of all frames of a video together.
        decoder: of files; None: they are decoded in this process.
        tokens_per_second: of video, see `VideoAdapter`.
    """
    adapters: list[ModalityAdapter] = []
    given = sources, max_pixels, decoder
    for modality in modalities:
        if modality is Modality.IMAGE:
            images = processor.image_processor
            if hasattr(images, "crop_to_patches"):
                adapters.append(TiledImageAdapter(processor, *given, crop_to_patches=True))
            elif hasattr(images, "do_pan_and_scan"):
                adapters.append(TiledImageAdapter(processor, *given, do_pan_and_scan=False))
            else:
                adapters.append(ImageAdapter(images, *given))
        elif modality is Modality.AUDIO:
            adapters.append(AudioAdapter(processor.feature_extractor, sources, decoder))
        elif modality is Modality.VIDEO:
            adapters.append(VideoAdapter(processor.video_processor, *given, tokens_per_second))
    return Adapters(adapters)
