"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``)."""

from __future__ import annotations


def register() -> None:
    """Make the connector known by name. Called in every process, possibly more than once."""
    from kvshare_mm.vllm.compat import install

    install()
