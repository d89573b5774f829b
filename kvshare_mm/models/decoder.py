"""The language part of a multimodal model, as if it were a language model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """``logits``: ``[1, kept rows, vocab_size]``."""

    logits: torch.Tensor


class Decoder(nn.Module):
    """Text model and head of a multimodal model.

    The engine runs this and nothing around it: the whole model would put features in where it finds
    placeholders, and keep positions of the last request in itself.

    Args:
        text: transformers' text model, without head.
        lm_head: hidden states to logits.
        generation_config: of the whole model.
        softcap: logits become ``softcap * tanh(logit / softcap)`` (Gemma 3n); None: they stay.
    """

    def __init__(
        self, text: Any, lm_head: Any, generation_config: Any, softcap: float | None = None
    ) -> None:
        super().__init__()
        self._softcap = softcap
        self.text = text
        self.lm_head = lm_head
        self.config = text.config
        self.generation_config = generation_config

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> Any:
        return self.text.get_input_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        """Of the text model alone: its encoders keep theirs."""
        self.text.set_attn_implementation(name)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> DecoderOutput:
        """Logits of the last `logits_to_keep` rows, or of all if it is 0.

        Args:
            input_ids: ``[1, n]``, or
            inputs_embeds: ``[1, n, hidden_size]``.
            position_ids: ``[1, n]``, or ``[3, 1, n]`` for M-RoPE.
        """
        hidden = self.text(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **options,
        ).last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return DecoderOutput(logits)
