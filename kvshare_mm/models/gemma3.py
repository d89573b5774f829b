"""Gemma 3 (arXiv 2503.19786): text and pictures, whose positions see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.stream import Modality


class Gemma3:
    """A loaded ``Gemma3ForConditionalGeneration``."""

    mrope = False
    both_ways = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = Decoder(model.model.language_model, model.lm_head, model.generation_config)
        self.placeholders = {Modality.IMAGE: int(model.config.image_token_id)}

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        features = self._model.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.cat(tuple(features))  # [1, mm_tokens_per_image, hidden_size]
