"""Tests of KVShare inside vLLM.

vLLM has an environment of its own (`make vllm-cpu`, then `make test-vllm`). Where it is missing,
files marked `vllm` are not collected, here and nowhere else; the others run everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# The engine's own processes read these. One thread: engines run beside each other here.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

collect_ignore = (
    []
    if importlib.util.find_spec("vllm")
    else [
        str(file)
        for file in Path(__file__).parent.glob("test_*.py")
        if "pytestmark = pytest.mark.vllm" in file.read_text(encoding="utf-8")
    ]
)


@pytest.fixture(scope="session")
def random_model(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of a random "llama" or "qwen2"; vLLM's CPU attention wants heads of 32 and more."""

    def folder(architecture: str) -> Path:
        made = tmp_path_factory.getbasetemp() / f"vllm-{architecture}"
        if not made.exists():
            shutil.copytree(tiny_folder, made, ignore=shutil.ignore_patterns("*.safetensors"))
            _build(architecture, made)
        return made

    return folder


def _build(architecture: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture](
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            # Fresh weights attend almost evenly, and answer one token over and over.
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.15)
    model.save_pretrained(folder)
