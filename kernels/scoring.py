"""What a layer does beyond a scaled dot product over all earlier keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """Which keys a layer's queries see, and what becomes of the scores.

    Attributes:
        window: a query sees so many keys, its own among them (Mistral, Gemma, gpt-oss); None: all.
        chunk: a query sees no key before its own chunk of so many tokens (Llama 4); None: all.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); None: they stay.
        sinks: ``[num_heads]`` scores of a key that every query sees and that has no value
            (gpt-oss); None: there is none.

    Raises:
        ValueError: a window, chunk or cap that is not positive, or both window and chunk.
    """

    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("window", "chunk", "softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, not positive")
        if self.window is not None and self.chunk is not None:
            raise ValueError("a layer has a window or chunks, not both")

    @property
    def span(self) -> tuple[int, int]:
        """Window and chunk, 0 for none: what decides who sees whom."""
        return self.window or 0, self.chunk or 0

    @property
    def fused(self) -> bool:
        """Whether the scores stay what a fused attention makes of them."""
        return self.softcap is None and self.sinks is None

    def first_key(self, index: int) -> int:
        """The first key that the query at token `index` sees."""
        if self.window is not None:
            return max(0, index - self.window + 1)
        return index // self.chunk * self.chunk if self.chunk is not None else 0


PLAIN = Scoring()
