"""Qwen3-VL (arXiv 2511.21631): text and pictures, with features for early layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvshare_mm.models.qwen2_vl import Qwen2VL
from kvshare_mm.stream import Modality


class Qwen3VL(Qwen2VL):
    """A loaded ``Qwen3VLForConditionalGeneration`` or ``Qwen3VLMoeForConditionalGeneration``."""

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What stands at the positions, and behind it what each of the first layers adds there."""
        out = self._model.get_image_features(**inputs, return_dict=True)
        parts = [out.pooler_output, *out.deepstack_features]
        return torch.cat([torch.cat(tuple(part)) for part in parts], dim=-1)
