"""Muon for matrices, AdamW for the rest, in float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps (K. Jordan, 2024).

    ``torch.optim.Muon`` orthogonalises in bfloat16, which is many times slower than float32 on
    CPUs without bfloat16 units; this one stays in the parameter's dtype. Updates are scaled to
    AdamW's usual size, so that both share one learning rate.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.02
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["mean"] = torch.zeros_like(param)
                mean = state["mean"].lerp_(param.grad, 1 - group["momentum"])
                update = orthogonal(param.grad.lerp(mean, group["momentum"]))
                param.mul_(1 - group["lr"] * group["decay"])
                param.add_(update, alpha=-group["lr"] * 0.2 * max(param.shape) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix of about the same singular vectors and singular values near 1."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return result


class MuonAdamW:
    """Both optimisers as one: Muon for hidden matrices, AdamW for embeddings, gains and biases."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], lr: float) -> None:
        named = [(name, param) for name, param in named if param.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and not any(w in n for w in _ADAMW_NAMES)]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.params = matrices + rest
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.02},
                    {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
                ],
                lr=lr,
                betas=(0.9, 0.98),
            )
        ]
        if matrices:
            self.parts.append(Muon(matrices, lr))

    def step(self, loss: Tensor, lr: float) -> float:
        """Backward pass and one update; returns the gradient's norm before it was clipped."""
        for param in self.params:
            param.grad = None
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.params, 1.0))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        return norm

    def state_dict(self) -> list[Any]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[Any]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


_ADAMW_NAMES = ("embed", "lm_head", "positional", "class_", "head.")
