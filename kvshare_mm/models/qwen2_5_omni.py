"""Qwen2.5-Omni's Thinker (arXiv 2503.20215): text, pictures and sound. It answers in text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.models.family import placeholders_of
from kvshare_mm.stream import Modality


class Qwen25Omni:
    """A loaded ``Qwen2_5OmniThinkerForConditionalGeneration``."""

    mrope = True
    both_ways = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = Decoder(model.model, model.lm_head, model.generation_config)
        self.placeholders = placeholders_of(model.config)

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if modality is Modality.IMAGE:
            features = self._model.get_image_features(**inputs, return_dict=True).pooler_output
            return torch.cat(tuple(features))
        sound: torch.Tensor = self._model.get_audio_features(
            **inputs, return_dict=True
        ).last_hidden_state
        return sound
