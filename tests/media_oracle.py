"""A multimodal model as we serve it, and what transformers itself makes of the same messages."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import librosa
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)

from kvshare_mm.assemble import media_support
from kvshare_mm.chat import MediaSupport, chat_stream
from kvshare_mm.config import KVShareConfig
from kvshare_mm.models.loader import LoadedModel, load_model
from kvshare_mm.stream import SegmentStream

from . import references


class Oracle:
    """Both sides of one model folder."""

    def __init__(self, folder: Path) -> None:
        self.loaded: LoadedModel = load_model(str(folder), dtype="float32")
        self.media: MediaSupport = media_support(self.loaded, KVShareConfig(model=str(folder)))
        self.processor = AutoProcessor.from_pretrained(folder)
        kind = AutoConfig.from_pretrained(folder).model_type
        model_class = {
            "qwen2_5_omni_thinker": Qwen2_5OmniThinkerForConditionalGeneration,
            "qwen2_audio": Qwen2AudioForConditionalGeneration,
        }.get(kind, AutoModelForImageTextToText)
        self.reference = model_class.from_pretrained(folder, dtype=torch.float32).eval()

    def stream(self, messages: list[dict[str, Any]]) -> SegmentStream:
        """Ours."""
        return chat_stream(messages, self.loaded.tokenizer, self.media)[0]

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The processor's, as its users would call it."""
        parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
        images = [p["image"] for p in parts if p["type"] == "image"]
        sounds = [_mono(p["audio"]) for p in parts if p["type"] == "audio"]
        videos = [p for p in parts if p["type"] == "video"]
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        media = {**({"images": images} if images else {}), **({"audio": sounds} if sounds else {})}
        if videos:
            media["videos"] = [p["video"] for p in videos]
            media["video_metadata"] = [
                {
                    "total_num_frames": len(p["video"]),
                    "frames_indices": list(range(len(p["video"]))),
                    "fps": p.get("fps"),
                }
                for p in videos
            ]
        return dict(self.processor(text=text, return_tensors="pt", **media))

    def full(self, inputs: dict[str, Any]) -> references.Full:
        return references.full(self.reference, inputs)

    def greedy(self, inputs: dict[str, Any], num_tokens: int) -> list[int]:
        return references.greedy(self.reference, inputs, num_tokens)


def _mono(source: Any) -> Any:
    if isinstance(source, bytes):
        return librosa.load(BytesIO(source), sr=16_000, mono=True)[0]
    return source[0]
