"""Qwen2-Audio (arXiv 2407.10759): text and sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.models.family import placeholders_of
from kvshare_mm.stream import Modality


class Qwen2Audio:
    """A loaded ``Qwen2AudioForConditionalGeneration``."""

    mrope = False
    both_ways = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.decoder = Decoder(model.model.language_model, model.lm_head, model.generation_config)
        self.placeholders = placeholders_of(model.config)

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tower = self._model.model.audio_tower
        spectrum, mask = inputs["input_features"], inputs["feature_attention_mask"]
        frames, length = (int(n) for n in tower._get_feat_extract_output_lengths(mask.sum()))
        # The model has no function for this part of its forward. Frames behind the clip's end are
        # padding that attention must not see.
        half = (spectrum.shape[-1] - 2) // 2 + 1
        seen = (torch.arange(half, device=mask.device) < frames).long()[None]
        attention_mask = create_bidirectional_mask(
            config=tower.config,
            inputs_embeds=torch.zeros(1, half, 1, dtype=spectrum.dtype, device=spectrum.device),
            attention_mask=seen,
        )
        states = tower(spectrum, attention_mask=attention_mask).last_hidden_state
        features: torch.Tensor = self._model.model.multi_modal_projector(states)[0, :length]
        return features
