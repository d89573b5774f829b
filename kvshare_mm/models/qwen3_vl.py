"""Qwen3-VL (arXiv 2511.21631): text and pictures, with features for early layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.stream import Modality


class Qwen3VL:
    """A loaded ``Qwen3VLForConditionalGeneration`` or ``Qwen3VLMoeForConditionalGeneration``."""

    mrope = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = Decoder(model.model.language_model, model.lm_head, model.generation_config)
        self.placeholders = {Modality.IMAGE: int(model.config.image_token_id)}

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What stands at the positions, and behind it what each of the first layers adds there."""
        out = self._model.get_image_features(**inputs, return_dict=True)
        parts = [out.pooler_output, *out.deepstack_features]
        return torch.cat([torch.cat(tuple(part)) for part in parts], dim=-1)
