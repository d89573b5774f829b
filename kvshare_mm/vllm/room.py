"""How much memory vLLM is given where it runs on a CPU, beside others who use the machine.

Its own choice is 92% of all there is, and it does not start where less than that is free.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from kvshare_mm.config import KVShareConfig

logger = logging.getLogger(__name__)

# The rest is for what others take between here and the end of vLLM's start.
_SHARE_OF_FREE = 0.9
_CHOSEN = frozenset({"gpu_memory_utilization", "kv_cache_memory_bytes"})


def fitted(arguments: dict[str, Any], config: KVShareConfig) -> dict[str, Any]:
    """vLLM's arguments, with a share of memory that is there, unless they name one."""
    from kvshare_mm.vllm.compat import cpu_memory

    if _CHOSEN & arguments.keys() or (memory := cpu_memory()) is None:
        return arguments
    total, free = memory
    donors = 0 if config.reuse == "off" else config.host_budget()
    share = share_of_memory(total, free, donors, int(arguments.get("tensor_parallel_size", 1)))
    logger.info(
        "vLLM may take %.1f%% of %.1f GiB memory; %.1f GiB are free",
        100 * share, total / 2**30, free / 2**30,
    )  # fmt: skip
    return {**arguments, "gpu_memory_utilization": share}


def share_of_memory(total: int, free: int, donors: int, workers: int = 1) -> float:
    """The part of all memory that each of vLLM's workers may take: model, KV and the rest.

    Args:
        total: bytes of the machine, or of what its container may use.
        free: bytes that nobody uses.
        donors: bytes that stored requests may come to take beside it; they get half at most.
        workers: of tensor parallelism.
    """
    room = max(free / 2, _SHARE_OF_FREE * free - donors) / workers
    return max(0.001, math.floor(1000 * room / total) / 1000)
