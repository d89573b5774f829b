"""`kvshare size`: what KV takes and what a store saves, from a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from kvshare_mm import ConfigError, ModelLoadError
from kvshare_mm.apps.size import measure_size
from kvshare_mm.models.check import check_model
from kvshare_mm.models.loader import load_model

from .conftest import Run

_LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


def config_only(folder: Path, **fields: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**_LLAMA_8B, **fields}))
    return str(folder)


def measured(model: str, **options: Any) -> dict[str, Any]:
    asked = {"requests_per_day": 1000, "prompt_tokens": 900, "answer_tokens": 100}
    asked |= {"dtype": "auto", "tflops": 400, "gbps": 25, "tiers": {"host": 10}}
    return measure_size(model, **{**asked, **options})


def test_a_config_without_weights(tmp_path: Path) -> None:
    found = measured(config_only(tmp_path))
    assert found["bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert found["tokens_per_gib"] == 8192
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    assert found["parameters"] == 32 * layer + 4096
    assert found["moving_wins_above_gbps"] == pytest.approx(
        131072 / (2 * found["parameters"] / 400e12) / 1e9
    )
    assert found["stores"]["host"]["requests"] == 81
    assert found["stores"]["host"]["hours"] == pytest.approx(24 * 81.92 / 1000)
    assert measured(config_only(tmp_path), dtype="float32")["bytes_per_token"] == 262_144


@pytest.mark.parametrize("model", ["tiny", "tiny-vl"])
def test_it_is_the_shape_of_the_loaded_model(tiny_folder: Path, model: str) -> None:
    name = str(tiny_folder) if model == "tiny" else model
    loaded = load_model(name)
    assert loaded.kv_shape is not None
    assert check_model(name).shape == loaded.kv_shape


def test_a_model_whose_kv_cannot_be_moved_says_so(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError, match=r"cannot be shared: .*dynamic"):
        measured(config_only(tmp_path, rope_parameters=rope))


@pytest.mark.parametrize("config", ["", "{}"])
def test_what_is_no_language_model_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelLoadError, match="Could not read"):
        measured(str(tmp_path))


def test_the_curve_that_the_bench_wrote(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    stream, curve = tmp_path / "stream.jsonl", tmp_path / "curve.json"
    rows = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))
    prompts = [f"Laboratory report. Patient number {i}. {rows}" for i in range(12)]
    stream.write_text("\n".join(json.dumps({"text": p}) for p in prompts))
    done = run("bench", "hitrate", "--stream", stream, "--model", tiny_folder, "--plan-only",
               "--embedder", "none", "--pool-sizes", "1,6", "--json", curve)  # fmt: skip
    assert done.exit_code == 0, done.output
    asked = ("size", "--model", tiny_folder, "--requests-per-day", "1000", "--similarity", curve)
    done = run(*asked, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["measured_pools"] == [1, 6]
    share = json.loads(curve.read_text())["pool_sizes"]["6"]["methods"]["kvshare"]["token_share"]
    assert found["stores"]["disk"]["found_kvshare"] == pytest.approx(share)
    assert share > 0
    table = run(*asked).output
    for words in ("KV of a token", "moving wins above", "of prompt tokens found"):
        assert words in table


def test_between_the_measured_pools(tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    pools = {
        str(size): {"methods": {m: {"token_share": share} for m in ("prefix", "kvshare")}}
        for size, share in ((8, 0.2), (512, 0.8))
    }
    curve.write_text(json.dumps({"kind": "hitrate", "pool_sizes": pools}))
    model = config_only(tmp_path)
    gib = 131072 * 1000 / 2**30  # of a request
    found = [
        measured(model, tiers={"disk": gib * n}, similarity=curve)["stores"]["disk"]
        for n in (1, 64, 10_000)
    ]
    assert [store["found_kvshare"] for store in found] == pytest.approx([0.2, 0.5, 0.8])
    saved = 0.5 * 900 * 1000 * (2 * measured(model)["parameters"] / 400e12 - 131072 / 25e9)
    assert found[1]["saved_device_s_per_day"] == pytest.approx(saved)


@pytest.mark.parametrize("text", ["", "{}", '{"pool_sizes": {}}', '{"pool_sizes": {"1": {}}}',
                                  '{"pool_sizes": {"1": {"methods": {}}}}'])  # fmt: skip
def test_another_file_is_no_curve(tmp_path: Path, text: str) -> None:
    (tmp_path / "curve").write_text(text)
    with pytest.raises(ConfigError, match="hitrate --json"):
        measured(config_only(tmp_path), similarity=tmp_path / "curve")


_METHODS = ("prefix", "kvshare")


@pytest.mark.parametrize("command", ["size", "simulate"])
@pytest.mark.parametrize("share", ["7", "-0.4", "1.0001", "NaN", "Infinity", "1e400", '"x"'])
@pytest.mark.parametrize("field", ["token_share", "shares"])
def test_a_share_is_between_none_and_all(
    run: Run, tmp_path: Path, command: str, share: str, field: str
) -> None:
    pools: dict[str, Any] = {"9": {"methods": {m: {"token_share": 0.5} for m in _METHODS}}}
    pools["9"]["methods"]["kvshare"][field] = [0.5, "?"] if field == "shares" else "?"
    (path := tmp_path / "curve").write_text(json.dumps({"pool_sizes": pools}).replace('"?"', share))
    done = _with_curve(run, command, path)
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: similarity: {path}")
    assert f"pool_sizes.9.methods.kvshare.{field}" in done.output


@pytest.mark.parametrize("size", ["-10", "0", "x"])
def test_a_pool_has_donors(run: Run, tmp_path: Path, size: str) -> None:
    pools = {size: {"methods": {m: {"token_share": 0.5} for m in _METHODS}}}
    (path := tmp_path / "curve").write_text(json.dumps({"pool_sizes": pools}))
    done = _with_curve(run, "size", path)
    assert done.exit_code == 1 and f"{path}" in done.output and f".{size}." in done.output


def _with_curve(run: Run, command: str, curve: Path) -> Result:
    asked = ("--model", config_only(curve.parent), "--requests-per-day", 9)
    return run(command, *(asked if command == "size" else ()), "--similarity", curve)


@pytest.mark.parametrize("number", [10**9, 1e-3])
def test_the_ends_of_the_bounds_give_numbers(run: Run, tmp_path: Path, number: float) -> None:
    asked = ("size", "--model", config_only(tmp_path), "--requests-per-day", 10**12)
    names = ("--host-gib", "--disk-gib", "--gpu-tflops", "--gpu-gbps")
    options = [word for name in names for word in (name, number)]
    done = run(*asked, *options, "--prompt-tokens", 10**9, "--answer-tokens", 10**9, "--json")
    assert done.exit_code == 0, done.output
    json.loads(done.output, parse_constant=pytest.fail)  # NaN or an infinity
