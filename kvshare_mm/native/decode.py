"""One decode step of several requests."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from kvshare_mm.native.request import SlotRequest
from kvshare_mm.native.slots import ModelRunner

logger = logging.getLogger(__name__)


def decode_step(
    runner: ModelRunner, batch: Sequence[SlotRequest]
) -> Sequence[torch.Tensor | Exception]:
    """``[vocab_size]`` logits of each request's next token, or why there are none.

    A batch that fails is decoded request by request: the culprit fails alone.
    """
    try:
        return list(_decoded(runner, batch))
    except Exception as failure:
        logger.warning("decoding %d requests failed; one by one now: %s", len(batch), failure)
    torch.cuda.empty_cache()  # what failed may have been short of memory
    return [_decoded_alone(runner, request) for request in batch]


def _decoded_alone(runner: ModelRunner, request: SlotRequest) -> torch.Tensor | Exception:
    try:
        return _decoded(runner, [request])[0]
    except Exception as failure:
        return failure


def _decoded(runner: ModelRunner, batch: Sequence[SlotRequest]) -> torch.Tensor:
    """``[len(batch), vocab_size]`` logits. A step can be repeated: it writes the same KV to the
    same places."""
    return runner.decode(
        [r.slot for r in batch],
        [r.token_ids[-1] for r in batch],
        [r.num_cached for r in batch],
        [r.prefill.rope_delta if r.prefill else 0 for r in batch],
    )
