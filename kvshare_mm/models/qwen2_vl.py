"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): text, pictures and video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.models.family import placeholders_of
from kvshare_mm.stream import Modality


class Qwen2VL:
    """A loaded ``Qwen2VLForConditionalGeneration`` or ``Qwen2_5_VLForConditionalGeneration``.

    Attributes:
        tokens_per_second: by how many positions a second of video moves what is seen; None: each
            picture of a video stands one behind the other.
    """

    mrope = True
    both_ways = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = Decoder(model.model.language_model, model.lm_head, model.generation_config)
        self.placeholders = placeholders_of(model.config)
        vision = getattr(model.config, "vision_config", None)
        self.tokens_per_second: float | None = getattr(vision, "tokens_per_second", None)

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        model = self._model
        is_video = modality is Modality.VIDEO
        run = model.get_video_features if is_video else model.get_image_features
        return torch.cat(tuple(run(**inputs, return_dict=True).pooler_output))
