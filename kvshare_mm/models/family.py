"""What differs between families of multimodal models, and which families there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.stream import Modality

# Model types whose media are taken.
MEDIA: dict[str, tuple[Modality, ...]] = {
    "qwen2_vl": (Modality.IMAGE, Modality.VIDEO),
    "qwen2_5_vl": (Modality.IMAGE, Modality.VIDEO),
    "qwen3_vl": (Modality.IMAGE,),
    "qwen3_vl_moe": (Modality.IMAGE,),
    "internvl": (Modality.IMAGE,),
    "gemma3": (Modality.IMAGE,),
    "qwen2_5_omni": (Modality.IMAGE, Modality.AUDIO),
    "qwen2_5_omni_thinker": (Modality.IMAGE, Modality.AUDIO),
    "qwen2_audio": (Modality.AUDIO,),
}
# Those that take media where their KV can be reused, and nowhere else: see `Family.both_ways`.
BOTH_WAYS = frozenset({"gemma3"})


def placeholders_of(config: Any) -> dict[Modality, int]:
    """The token that stands for a medium in the prompt, of each that a model takes."""
    return {
        modality: int(getattr(config, f"{modality}_token_id"))
        for modality in MEDIA[config.model_type]
    }


class Family(Protocol):
    """One loaded multimodal model."""

    @property
    def decoder(self) -> Decoder:
        """Its language part."""

    @property
    def placeholders(self) -> Mapping[Modality, int]:
        """The token that stands for a medium in the prompt, by modality."""

    @property
    def mrope(self) -> bool:
        """Whether its rotary positions have three axes."""

    @property
    def both_ways(self) -> bool:
        """Whether the positions of a medium see all of it, and not only what is before them."""

    def encode(self, modality: Modality, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run an encoder on one medium.

        Args:
            inputs: what the modality's adapter makes, on the model's device.

        Returns:
            ``[length, hidden_size]``: what stands at the medium's positions. More channels, a
            multiple of these: what the first layers add to their outputs there (DeepStack, arXiv
            2406.04334), layer by layer.
        """


def load_family(model_type: str, source: str, **options: Any) -> tuple[Any, Family, Any] | None:
    """Load a multimodal model: the model, its family, transformers' loading report.

    Returns:
        None if `model_type` is of no multimodal family that is known here.
    """
    if model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "gemma3"):
        from transformers import AutoModelForImageTextToText

        model, report = AutoModelForImageTextToText.from_pretrained(source, **options)
        return model, _seeing(model_type, model), report
    if model_type in ("qwen2_5_omni", "qwen2_5_omni_thinker"):
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        from kvshare_mm.models.qwen2_5_omni import Qwen25Omni

        model, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            source, **options
        )
        return model, Qwen25Omni(model), report
    if model_type == "qwen2_audio":
        from transformers import Qwen2AudioForConditionalGeneration

        from kvshare_mm.models.qwen2_audio import Qwen2Audio

        model, report = Qwen2AudioForConditionalGeneration.from_pretrained(source, **options)
        return model, Qwen2Audio(model), report
    return None


def load_text_part(config: Any, source: str, **options: Any) -> tuple[Any, Decoder, Any] | None:
    """Load a multimodal model of no family that is known here, to serve text with it.

    Returns:
        The model, its language part and transformers' loading report; None if it is a model of text
        alone, or transformers has the language part as a model of its own.

    Raises:
        ValueError: its language part is not found, or does not answer as the whole model does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind, of_text = type(config), AutoModelForCausalLM._model_mapping
    seeing = AutoModelForImageTextToText._model_mapping
    if kind not in seeing or (kind in of_text and of_text[kind] is not seeing[kind]):
        return None
    model, report = AutoModelForImageTextToText.from_pretrained(source, **options)
    inner = getattr(model, "model", None)
    found = (getattr(inner, name, None) for name in ("language_model", "text_model"))
    text, head = next(filter(None, found), inner), getattr(model, "lm_head", None)
    if text is None or head is None or config.is_encoder_decoder:
        raise ValueError(f"The language part of a {config.model_type} is not known here.")
    ids = torch.arange(3, 10, device=model.device).remainder(text.config.vocab_size)[None]
    # Some models of one type say a cap in their configuration and do not use it.
    caps = (None, getattr(text.config, "final_logit_softcapping", None))
    parts = [Decoder(text, head, model.generation_config, cap) for cap in caps]
    with torch.inference_mode():
        whole, *alone = (m(input_ids=ids, use_cache=False).logits.float() for m in (model, *parts))
    errors = [float((logits - whole).abs().max()) for logits in alone]
    tolerance = 1e-3 if model.dtype == torch.float32 else 1e-1  # other masks round otherwise
    if not min(errors) <= tolerance * float(whole.abs().max()):
        raise ValueError(
            f"The language part of a {config.model_type} does not answer as all of it."
        )
    return model, parts[errors.index(min(errors))], report


def _seeing(model_type: str, model: Any) -> Family:
    if model_type == "internvl":
        from kvshare_mm.models.internvl import InternVL

        return InternVL(model)
    if model_type == "gemma3":
        from kvshare_mm.models.gemma3 import Gemma3

        return Gemma3(model)
    if model_type.startswith("qwen3"):
        from kvshare_mm.models.qwen3_vl import Qwen3VL

        return Qwen3VL(model)
    from kvshare_mm.models.qwen2_vl import Qwen2VL

    return Qwen2VL(model)
