"""One decode step of several requests: each its last token, and a draft of what comes behind."""

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
    """``[1 + G, vocab_size]`` logits behind each request's last token and its `draft`, or why there
    are none.

    A batch that fails is decoded request by request: the culprit fails alone.
    """
    try:
        return _decoded(runner, batch)
    except Exception as failure:
        logger.warning("decoding %d requests failed; one by one now: %s", len(batch), failure)
    torch.cuda.empty_cache()  # what failed may have been short of memory
    return [_decoded_alone(runner, request) for request in batch]


def _decoded_alone(runner: ModelRunner, request: SlotRequest) -> torch.Tensor | Exception:
    try:
        return _decoded(runner, [request])[0]
    except Exception as failure:
        return failure


def _decoded(runner: ModelRunner, batch: Sequence[SlotRequest]) -> list[torch.Tensor]:
    """A step can be repeated: it writes the same KV to the same places."""
    rows = [(r, i, t) for r in batch for i, t in enumerate((r.token_ids[-1], *r.draft))]
    logits = runner.decode(
        [r.slot for r, _, _ in rows],
        [token for _, _, token in rows],
        [r.num_cached + i for r, i, _ in rows],
        [r.prefill.rope_delta if r.prefill else 0 for r, _, _ in rows],
    )
    return list(logits.split([1 + len(r.draft) for r in batch]))
