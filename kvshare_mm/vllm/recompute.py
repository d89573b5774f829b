"""Audits on a worker: a finished request is computed in full, in the blocks that it was served in.

All ranks carry out the same steps in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from kvshare_mm.reuse.audits import compared
from kvshare_mm.vllm.forward import Part, PartialForward
from kvshare_mm.vllm.meta import AuditReport, AuditStep

logger = logging.getLogger(__name__)

Head = Callable[[torch.Tensor], torch.Tensor | None]


class Recompute:
    """Carries out the steps of one audit at a time.

    Args:
        forward: runs the model.
        head: ``[n, hidden_size]`` to ``[n, vocab_size]`` logits; None on ranks that have none.
    """

    def __init__(self, forward: PartialForward, head: Head) -> None:
        self._forward = forward
        self._head = head
        self._served: tuple[str, torch.Tensor | None] = "", None

    def step(self, step: AuditStep) -> AuditReport:
        """Compute a chunk."""
        name = step.request_id
        try:
            part = Part([step.span], step.token_ids, step.positions, step.block_ids)
            hidden = self._forward.run([part], keep=step.what != "served")
            if step.what == "compute":
                return AuditReport(name)
            with torch.inference_mode():
                logits = self._head(hidden)
                if step.what == "served":
                    self._served = name, logits
                    return AuditReport(name)
                (whose, served), self._served = self._served, ("", None)
                if logits is None or served is None:
                    return AuditReport(name, failed=logits is not None)
                if whose != name:
                    raise RuntimeError(f"the logits that were kept are of {whose}")
                return AuditReport(name, tuple(map(compared, logits, served)))
        except Exception:
            # An audit is nobody's request.
            logger.exception("the audit of %s failed", name)
            return AuditReport(name, failed=True)
