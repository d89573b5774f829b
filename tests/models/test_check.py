"""What a model's configuration says before its weights are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from kvshare_mm.apps.models import models
from kvshare_mm.errors import ModelLoadError
from kvshare_mm.models import check
from kvshare_mm.models.check import check_config, check_model
from kvshare_mm.models.shape import KVShape
from kvshare_mm.stream import Modality

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}

# Nine layers of DeltaNet: a matrix for each value head, and the last four inputs of a convolution.
HYBRID = {
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "dtype": "bfloat16",
}
HYBRID_CONV = 9 * (2 * 2 * 16 + 4 * 16) * 4
HYBRID_STATE = 9 * 4 * 16 * 16 * 4 + 2 * HYBRID_CONV


def test_a_folder_with_a_config_and_no_weights(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **LLAMA_8B).save_pretrained(tmp_path)
    checked = check_model(str(tmp_path))
    assert checked.reason is None and not checked.windows and not checked.media
    assert checked.shape == KVShape(32, 8, 128, 128)
    assert (checked.dtype, checked.bytes_per_token) == (torch.bfloat16, 131072)
    assert checked.context_len == 131072


@pytest.mark.parametrize(
    ("kind", "options", "size", "windows"),
    [
        # gpt-oss 20B, Gemma 3 4B, DeepSeek V3: as their config.json have them.
        ("gpt_oss", {"num_hidden_layers": 24}, 49152, True),
        ("gemma3_text", {"num_hidden_layers": 34}, 139264, True),
        ("deepseek_v3", {}, 70272, False),
        # Heads as wide as the rest; layers that share KV; the language part of GLM-OCR, of Omni.
        ("cohere", {}, 1310720, False),
        ("helium", {}, 245760, False),
        ("gemma3n", {}, 71680, True),
        ("glm_ocr", {}, 32768, False),
        ("qwen2_5_omni", {}, 57344, False),
    ],
)
def test_kinds_of_attention(
    kind: str, options: dict[str, int], size: int, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_MOST_PARAMETERS", 500_000_000)
    checked = check_config(AutoConfig.for_model(kind, dtype="bfloat16", **options))
    assert (checked.reason, checked.windows) == (None, windows)
    assert checked.bytes_per_token == size


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "rotary"),
        ({"model_type": "mamba", "num_hidden_layers": 1}, "recurrent"),
        ({"model_type": "mllama"}, "mllama_text_model are not known"),
        # Nothing large is made.
        ({"model_type": "llama", "num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "llama", "head_dim": 10**6}, "parameters"),
        ({"model_type": "llama", "vocab_size": 10**15}, "overflow"),
        ({"model_type": "qwen2_vl", "text_config": {"num_attention_heads": 0}}, "zero"),
    ],
)
def test_others_are_declined_in_words(config: dict[str, Any], words: str) -> None:
    checked = check_config(AutoConfig.for_model(**config))
    assert checked.reason is not None and words in checked.reason
    assert checked.shape is None and checked.bytes_per_token is None


def test_of_other_multimodal_models_the_text_is_checked() -> None:
    checked = check_config(AutoConfig.for_model("mistral3"))
    assert (checked.model_type, checked.reason, checked.media) == ("mistral", None, ())


def test_pictures() -> None:
    checked = check_config(AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 34}))
    assert (checked.model_type, checked.reason) == ("gemma3_text", None)
    assert checked.media == (Modality.IMAGE,) and checked.windows
    assert checked.bytes_per_token == 139264  # as of its text alone, which is put to the proof
    checked = check_model("tiny-vl")
    assert checked.media == (Modality.IMAGE, Modality.VIDEO) and checked.shape == KVShape(
        4, 2, 32, 32
    )


def test_pictures_that_see_both_ways_need_partial_attention() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    text = {"num_hidden_layers": 6, "rope_parameters": {"full_attention": rope}}
    checked = check_config(AutoConfig.for_model("gemma3", text_config=text))
    assert checked.reason is not None and checked.media == ()


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="Could not read"):
        check_model(str(tmp_path))


def test_the_command(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **LLAMA_8B).save_pretrained(tmp_path)
    out = tmp_path / "report.json"
    done = CliRunner().invoke(models, ["check", str(tmp_path), "--json", str(out)])
    assert done.exit_code == 0 and "131,072 bytes" in done.output
    assert json.loads(out.read_text())["bytes_per_token"] == 131072
    AutoConfig.for_model("qwen3_5_text", **HYBRID).save_pretrained(tmp_path)
    exact = CliRunner().invoke(models, ["check", str(tmp_path)])
    assert exact.exit_code == 0 and "exact prefix only: state checkpoints" in exact.output
    assert "recurrent layers" in exact.output and f"{HYBRID_STATE:,} bytes" in exact.output
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    moved = CliRunner().invoke(models, ["check", str(tmp_path)])
    assert moved.exit_code == 0 and "exact prefix only" in moved.output
    assert "checkpoint" not in moved.output and "no rotary position" in moved.output
    AutoConfig.for_model("mamba", num_hidden_layers=1).save_pretrained(tmp_path)
    declined = CliRunner().invoke(models, ["check", str(tmp_path)])
    assert declined.exit_code == 1 and "several tokens" in declined.output


def test_bytes_of_a_state_are_those_of_all_layers() -> None:
    """Though one of each kind is made; what a convolution keeps has the dtype of the model."""
    checked = check_config(AutoConfig.for_model("qwen3_5_text", **HYBRID))
    assert (checked.exact, checked.shape, checked.state_bytes) == (True, None, HYBRID_STATE)
    wide = check_config(AutoConfig.for_model("qwen3_5_text", **HYBRID | {"dtype": "float32"}))
    assert wide.state_bytes == HYBRID_STATE + 2 * HYBRID_CONV
    attention = check_config(AutoConfig.for_model("llama", **LLAMA_8B))
    assert attention.exact and attention.state_bytes == 0
