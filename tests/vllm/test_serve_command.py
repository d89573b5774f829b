"""What `kvshare serve --engine vllm` starts; vLLM itself is not needed for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from kvshare_mm.apps.cli import app
from kvshare_mm.apps.server import vllm_server
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ConfigError
from kvshare_mm.vllm.arguments import engine_arguments
from kvshare_mm.vllm.options import ConnectorOptions

run = CliRunner().invoke


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model folder as far as a command line needs it."""
    config = {"model_type": "llama", "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(tmp_path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that took the process's place."""
    words: list[str] = []

    def take(program: str, command: list[str]) -> None:
        assert program == sys.executable
        words.extend(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", take)
    monkeypatch.setattr(vllm_server, "check_installed", lambda: None)
    return words


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_vllms_server_gets_the_connector_the_options_and_its_own(
    folder: str, started: list[str]
) -> None:
    asked = ["--port", "8123", "--reuse", "exact", "--host-gib", "1", "--max-model-len", "512"]
    asked += ["--audit-share", "0.5", "--audit-budget", "100"]
    result = run(app, ["serve", folder, "--engine", "vllm", *asked, "--", "--enforce-eager"])
    assert result.exit_code == 0, result.output
    assert started[1:5] == ["-m", *vllm_server._program(), folder]
    assert after(started, "--port") == "8123"
    assert after(started, "--host") == "127.0.0.1"
    assert after(started, "--max-model-len") == "512"
    assert after(started, "--served-model-name") == folder
    assert after(started, "--dtype") == "float32"
    assert "--max-num-seqs" not in started, "what nobody asked for is vLLM's choice"
    assert started[-1] == "--enforce-eager"
    config = json.loads(after(started, "--kv-transfer-config"))
    options = ConnectorOptions.of(config["kv_connector_extra_config"])
    assert options.core.reuse == "exact"
    assert options.core.host_bytes == 1 << 30
    assert (options.core.audit_share, options.core.audit_budget) == (0.5, 100)


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("vllm", ["vllm.entrypoints.cli.main", "serve"]),
        ("vllm-cpu", ["vllm.entrypoints.openai.api_server", "--model"]),
    ],
)
def test_builds_for_cpus_are_started_by_module(
    monkeypatch: pytest.MonkeyPatch, package: str, words: list[str]
) -> None:
    def version(name: str) -> str:
        if name == package:
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert vllm_server._program() == words


def test_an_embedded_model_is_its_folder_and_keeps_its_name(
    monkeypatch: pytest.MonkeyPatch, folder: str, started: list[str]
) -> None:
    monkeypatch.setattr("kvshare_mm.vllm.arguments.locate", lambda name: folder)
    result = run(app, ["serve", "--engine", "vllm", "--", "--enforce-eager"])
    assert result.exit_code == 0, result.output
    assert started[4] == folder
    assert after(started, "--served-model-name") == "smollm2"
    assert started[-1] == "--enforce-eager"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--ui"], "--ui"),
        (["--max-queue", "9"], "--max-queue"),
        (["--scope", "tenant"], "--scope"),
        (["--calibration", "learned.json"], "--calibration"),
        (["--api-keys", "keys.jsonl"], "--api-keys"),
        (["--", "--kv-transfer-config={}"], "--kv-transfer-config"),
        (["--max-divergence", "0.1", "--repair", "none"], "max_divergence"),
    ],
)
def test_what_vllms_server_has_no_use_for_is_named(
    folder: str, started: list[str], words: list[str], named: str
) -> None:
    result = run(app, ["serve", folder, "--engine", "vllm", *words])
    assert result.exit_code == 1
    assert named in result.output
    assert not started


def test_options_of_vllm_need_vllm() -> None:
    result = run(app, ["serve", "smollm2", "--", "--enforce-eager"])
    assert result.exit_code == 2
    assert "--engine vllm" in re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_without_vllm_one_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(app, ["serve", "smollm2", "--engine", "vllm"])
    assert result.exit_code == 1
    assert "make vllm-cpu" in result.output
    assert "kvshare-mm[vllm]" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefill_chunk": 64}, "prefill_chunk"),
        ({"engine_options": {"max_model_len": 64}}, "max_model_len"),
        ({"engine_options": {"kv_transfer_config": {}}}, "kv_transfer_config"),
    ],
)
def test_options_that_say_nothing_to_vllm_are_named(
    folder: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        engine_arguments(KVShareConfig.of(model=folder, engine="vllm", **options))


def test_vllm_keeps_the_kv_behind_windows(folder: str, tmp_path: Path) -> None:
    windowed = str(tmp_path / "windowed")
    AutoConfig.for_model("gemma2").save_pretrained(windowed)

    def whole(model: str, **options: Any) -> Any:
        config = KVShareConfig.of(model=model, engine="vllm", dtype="float32", **options)
        return engine_arguments(config).get("disable_hybrid_kv_cache_manager")

    assert whole(windowed) is True
    assert whole(windowed, reuse="off") is None
    own = {"disable_hybrid_kv_cache_manager": False}
    assert whole(windowed, engine_options=own) is False
    assert whole(folder) is None


def test_vllms_words_are_no_options_of_the_native_engine() -> None:
    with pytest.raises(ConfigError, match="engine_options"):
        KVShareConfig.of(engine_options={"enforce_eager": True})


def test_the_key_is_told_where_others_do_not_see_it(
    folder: str, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of before")
    asked = ["--api-key", "the-key", "--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem"]
    result = run(app, ["serve", folder, "--engine", "vllm", *asked])
    assert result.exit_code == 0, result.output
    assert os.environ["VLLM_API_KEY"] == "the-key" and "the-key" not in started
    assert (after(started, "--ssl-certfile"), after(started, "--ssl-keyfile")) == ("c.pem", "k.pem")
