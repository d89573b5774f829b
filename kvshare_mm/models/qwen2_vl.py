"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): text and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.stream import Modality


class Qwen2VL:
    """A loaded ``Qwen2VLForConditionalGeneration`` or ``Qwen2_5_VLForConditionalGeneration``."""

    mrope = True
    both_ways = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = Decoder(model.model.language_model, model.lm_head, model.generation_config)
        self.placeholders = {Modality.IMAGE: int(model.config.image_token_id)}

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        features = self._model.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.cat(tuple(features))
