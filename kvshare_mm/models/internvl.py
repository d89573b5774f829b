"""InternVL 3 (arXiv 2504.10479) and 3.5 (arXiv 2508.18265): text and pictures in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.models.family import placeholders_of
from kvshare_mm.stream import Modality


class InternVL:
    """A loaded ``InternVLForConditionalGeneration``."""

    mrope = False
    both_ways = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = Decoder(model.model.language_model, model.lm_head, model.generation_config)
        self.placeholders = placeholders_of(model.config)

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        config = self._model.config
        features: torch.Tensor = self._model.get_image_features(
            **inputs,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        return features.flatten(0, 1)  # [tiles, tokens of a tile, hidden_size]
