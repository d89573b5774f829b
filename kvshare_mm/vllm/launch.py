"""How vLLM is told to use KVShare. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvshare_mm.vllm.options import ConnectorOptions

CONNECTOR = "KVShareConnector"
MODULE = "kvshare_mm.vllm.connector"


def kv_transfer_config(options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` with KVShare in it, ready for JSON.

    >>> vllm.LLM(model, kv_transfer_config=kv_transfer_config({"max_divergence": 0.01}))

    Args:
        options: fields of `ConnectorOptions` and those of `KVShareConfig` that it takes.

    Raises:
        ConfigError: an option is wrong; it is named.
    """
    given = dict(options or {})
    ConnectorOptions.of(given)
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        # A cache that cannot be read is a miss: vLLM's default is to fail the request.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            name: value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
            for name, value in given.items()
        },
    }
