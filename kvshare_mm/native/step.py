"""One step of the engine: a chunk of a prompt, and every running answer's next token.

Where the runner can, both are one forward: it reads the weights once, and the answers wait for the
chunk's rows alone. An answer's rows are its last token and a draft of what comes behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from kvshare_mm.native.prefill import Prefill, PrefillResult
from kvshare_mm.native.request import SlotRequest
from kvshare_mm.native.slots import Chunk, ModelRunner, SlotRunner

logger = logging.getLogger(__name__)

# ``[1 + G, vocab_size]`` logits behind each request's last token and its `draft`, or why there are
# none.
Decoded = Sequence[torch.Tensor | Exception]


def step(
    runner: ModelRunner, prompt: Prefill | None, batch: Sequence[SlotRequest], *, alone: bool
) -> tuple[PrefillResult | Exception | None, Decoded]:
    """Compute what comes next of a prompt and of the requests that are answered.

    What fails together is computed apart: the culprit fails alone.

    Args:
        prompt: one that is being computed, if any is.
        batch: the requests that are answered.
        alone: nobody but the prompt is in a slot; else it is computed in smaller chunks.

    Returns:
        The prompt's result, if this was its last chunk, or why there is none; the answers' logits.
    """
    result: PrefillResult | Exception | None = None
    if prompt is not None:
        try:
            chunk = prompt.next(runner.chunk if alone else runner.beside(prompt.context))
            if batch and isinstance(runner, SlotRunner) and runner.packs(chunk):
                packed = _packed(runner, prompt, chunk, batch)
                if packed is not None:
                    return packed
            result = prompt.compute(chunk)
        except Exception as failure:
            result = failure
    return result, decode_step(runner, batch) if batch else ()


def decode_step(runner: ModelRunner, batch: Sequence[SlotRequest]) -> Decoded:
    """The answers' next tokens alone.

    A batch that fails is decoded request by request.
    """
    try:
        return _split(runner.decode(*_rows(batch)), batch)
    except Exception as failure:
        logger.warning("decoding %d requests failed; one by one now: %s", len(batch), failure)
    torch.cuda.empty_cache()  # what failed may have been short of memory
    return [_decoded_alone(runner, request) for request in batch]


def _packed(
    runner: SlotRunner, prompt: Prefill, chunk: Chunk, batch: Sequence[SlotRequest]
) -> tuple[PrefillResult | None, Decoded] | None:
    """A step in one forward; None: it failed."""
    start = time.perf_counter()
    try:
        logits = runner.step(chunk, *_rows(batch))
    except Exception as failure:
        logger.warning("a chunk and %d answers failed together: %s", len(batch), failure)
        torch.cuda.empty_cache()
        return None
    # A copy: a request keeps its own as long as it is answered, and the answers' are as many.
    return prompt.computed(chunk, logits[0].clone(), start), _split(logits[1:], batch)


def _decoded_alone(runner: ModelRunner, request: SlotRequest) -> torch.Tensor | Exception:
    try:
        return runner.decode(*_rows([request]))
    except Exception as failure:
        return failure


def _rows(batch: Sequence[SlotRequest]) -> tuple[Any, ...]:
    """What `ModelRunner.decode` takes. A step can be repeated: it writes the same KV to the same
    places."""
    rows = [(r, i, t) for r in batch for i, t in enumerate((r.token_ids[-1], *r.draft))]
    return (
        [r.slot for r, _, _ in rows],
        [token for _, _, token in rows],
        [r.num_cached + i for r, i, _ in rows],
        [r.prefill.rope_delta if r.prefill else 0 for r, _, _ in rows],
    )


def _split(logits: torch.Tensor, batch: Sequence[SlotRequest]) -> list[torch.Tensor]:
    return list(logits.split([1 + len(r.draft) for r in batch]))
