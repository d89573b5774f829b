"""What holds for every test."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Tests never reach for a model hub: what they need is installed (see models.txt) or made by them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton decides once for a process, when it is imported, whether it interprets kernels or compiles
# them. Without a GPU there is only the interpreter; on one, TRITON_INTERPRET=0 tests what runs.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests that run beside each other share the cores; what they start reads this, too.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.pop("COLUMNS", None)  # a console would take it for its width, for good
# vLLM's own processes read these. One thread: engines run beside each other here.
if importlib.util.find_spec("vllm"):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# Helpers that assert say what differed, as tests do.
pytest.register_assert_rewrite(
    *(f"{__package__}.{name}" for name in ("native.donor_server", "semantics.engines"))
)

# The first call into torch takes longer than any deadline; CI must not fail on a lucky draw.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Files of end-to-end tests that take minutes, the longest first: workers take file after file, and
# shall end together.
_LONG = ("test_compile.py", "test_docs_run.py", "test_killed.py", "test_careless.py")

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. ",
    "Laboratory report. Patient number 48210. Haemoglobin 148 g/L, sodium 141 mmol/L. ",
    "Question: what is the value? Answer with the number and nothing else. ",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else 99)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a context of 512 with a byte-level tokenizer and a chat template."""
    from .helpers import byte_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = byte_tokenizer(
        _CORPUS,
        400,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    _build_random("llama", folder, hidden_size=64)
    return folder


@pytest.fixture(scope="session")
def random_model(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of a random model of an architecture that vLLM runs, its windows far shorter than
    prompts; its CPU attention wants heads of 32 and more."""

    def folder(architecture: str) -> Path:
        made = tmp_path_factory.getbasetemp() / f"vllm-{architecture}"
        if not made.exists():
            shutil.copytree(tiny_folder, made, ignore=shutil.ignore_patterns("*.safetensors"))
            _build_random(architecture, made)
        return made

    return folder


_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
_WINDOWS = {"sliding_window": 24, "layer_types": _EVERY_OTHER, "num_hidden_layers": 4}
# Its CPU attention knows latents of 512 + 64 alone, and turns neighbours right with YaRN alone.
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}
# Those that vLLM is tested with, and what they want beside the sizes that all have.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, **_WINDOWS},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, **_WINDOWS},
    "gpt_oss": {"head_dim": 32, **_MOE, **_WINDOWS},
    "olmo3": _WINDOWS,
    "smollm3": {"num_hidden_layers": 4, "head_dim": 32},
    "llama4_text": {
        "head_dim": 32,
        "num_hidden_layers": 4,
        "attention_chunk_size": 32,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 1, 1, 0],
        **_MOE,
        "num_experts_per_tok": 1,
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": _LATENT,
}


def _build_random(architecture: str, folder: Path, hidden_size: int = 128) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = AutoConfig.for_model(architecture, **{**sizes, **RANDOM_MODELS[architecture]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            # Fresh weights attend almost evenly, and answer one token over and over.
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.15)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random multimodal model, by family; each is built once."""
    from .media_models import build

    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = tmp_path_factory.mktemp(family)
            build(family, built[family])
        return built[family]

    return folder


@pytest.fixture(scope="session")
def oracles(media_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """The tiny multimodal models as we and as transformers serve them, by family."""
    from .media_oracle import Oracle

    opened: dict[str, Oracle] = {}

    def oracle(family: str) -> Oracle:
        if family not in opened:
            opened[family] = Oracle(media_folder(family))
        return opened[family]

    return oracle


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random open_clip model."""
    import json

    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    model_config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model_config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3}}
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = CLIP(**model_config).state_dict()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


@pytest.fixture
def open_llm(tiny_folder: Path) -> Iterator[Callable[..., Any]]:
    """Opens `KVShare` on the tiny model, without dense search; closed after the test."""
    from kvshare_mm import KVShare

    opened: list[Any] = []

    def make(**options: Any) -> Any:
        llm = KVShare(str(tiny_folder), **{"embedder": None, **options})
        opened.append(llm)
        return llm

    yield make
    for llm in reversed(opened):
        llm.close()
