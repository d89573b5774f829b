"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``)."""

from __future__ import annotations

import os


def register() -> None:
    """Make the connector known by name. Called in every process, possibly more than once."""
    from kvshare_mm.vllm.compat import install
    from kvshare_mm.vllm.failures import VARIABLE, note

    note(os.environ.get(VARIABLE))
    install()
