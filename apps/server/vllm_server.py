"""`kvshare serve --engine vllm`: vLLM's own server, with KVShare in it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from kvshare_mm.apps.options import FIELDS, config_values
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ConfigError
from kvshare_mm.vllm.arguments import check_installed, command_line, engine_arguments
from kvshare_mm.vllm.options import SHARED_OPTIONS
from kvshare_mm.vllm.room import fitted

# Fields of KVShareConfig that vLLM takes, or KVShare in it ...
_CONFIG = SHARED_OPTIONS | {"model", "dtype", "max_model_len", "max_num_seqs"}
# ... and options of `kvshare serve` with what they are called in `vllm serve`.
_VLLM: Mapping[str, str] = {
    "host": "host",
    "port": "port",
    "served_model_name": "served_model_name",
    "otlp_traces": "otlp_traces_endpoint",
    "ssl_certfile": "ssl_certfile",
    "ssl_keyfile": "ssl_keyfile",
}
_DEFAULTS = {"model": "smollm2", "host": "127.0.0.1", "port": 8000}


def command(named: Mapping[str, Any], own: Sequence[str]) -> list[str]:
    """The command line that serves a model.

    Args:
        named: options of `kvshare serve` as far as they were given, by name.
        own: vLLM's options, as they are; they come last.

    Raises:
        ConfigError: an option that vLLM's server has no use for, or one that is not to be changed.
        ModelLoadError: there is no such model.
    """
    given = {**_DEFAULTS, **named}
    if str(given["model"]).startswith("-"):  # what follows `--` is MODEL, if MODEL is not named
        own = [str(given["model"]), *own]
        given["model"] = _DEFAULTS["model"]
    if foreign := sorted(n for n in given if n not in _VLLM and FIELDS.get(n) not in _CONFIG):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise ConfigError(f"{flags}: not with --engine vllm; see `vllm serve --help`")
    if any(word.partition("=")[0] == "--kv-transfer-config" for word in own):
        raise ConfigError(
            "--kv-transfer-config is what --engine vllm sets; KVShare's options are its own"
        )
    engine = KVShareConfig.of(engine="vllm", **config_values(given))
    arguments: dict[str, Any] = {
        **fitted(engine_arguments(engine), engine),
        "served_model_name": given["model"],
        "enable_prompt_tokens_details": True,
        **{_VLLM[name]: value for name, value in given.items() if name in _VLLM},
    }
    return [sys.executable, "-m", *_program(), *command_line(arguments), *own]


def _program() -> list[str]:
    """vLLM's module that serves, and the word before the model.

    vLLM's command line looks up its own version as that of a package `vllm`; builds for CPUs are
    packages of another name, and it fails there. The module behind it does not.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm.entrypoints.cli.main", "serve"]


def replace_process(named: Mapping[str, Any], own: Sequence[str]) -> NoReturn:
    """Become vLLM's server: signals reach it as they reach any server."""
    check_installed()
    words = command({name: named[name] for name in named if name != "api_key"}, own)
    if api_key := named.get("api_key"):
        os.environ["VLLM_API_KEY"] = api_key  # others do not see it there
    os.execv(words[0], words)
