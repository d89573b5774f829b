"""KVShare inside vLLM. `launch` needs no vLLM; everything else is imported by vLLM's processes."""

from kvshare_mm.vllm.launch import kv_transfer_config

__all__ = ["kv_transfer_config"]
