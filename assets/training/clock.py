"""A training stage with a budget of minutes: learning rate by time, checkpoints, going on."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 120.0


class Stage:
    """Counts a stage's steps and seconds; ``state`` (modules, optimiser) is saved along.

    Seconds are those a core worked for this process, so that a busy machine only makes training
    take longer, not end earlier.

    A stage that was stopped goes on from its last checkpoint when it is made again with the same
    file, with the seconds that were used already counted.

    Args:
        file: where the checkpoint is.
        minutes: budget of core minutes.
        state: named things with ``state_dict`` and ``load_state_dict``.
        peak: highest learning rate.
        warmup: steps until it is reached.
        floor: last learning rate as a share of the highest (cosine in between).
    """

    def __init__(
        self,
        file: Path,
        minutes: float,
        state: dict[str, Any],
        *,
        peak: float,
        warmup: int = 60,
        floor: float = 0.02,
    ) -> None:
        self.file, self.budget, self.state = file, minutes * 60, state
        self.peak, self.warmup, self.floor = peak, warmup, floor
        self.step, self.used = 0, 0.0
        if file.is_file():
            saved = torch.load(file, weights_only=False)
            for name, thing in state.items():
                thing.load_state_dict(saved["state"][name])
            self.step, self.used = saved["step"], saved["used"]
            logger.info("%s goes on from step %d, %.0f s", file.stem, self.step, self.used)

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        return min(1.0, self.used / self.budget)

    @property
    def rate(self) -> float:
        """Learning rate of this step."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return self.peak * min(1.0, (self.step + 1) / self.warmup) * max(cosine, self.floor)

    def __iter__(self) -> Iterator[float]:
        """Yields the progress once a step until the budget is used up."""
        last_saved = self.used
        with tqdm(total=round(self.budget), unit="s", mininterval=20) as bar:
            bar.set_description(self.file.stem)
            bar.update(round(self.used))
            while self.used < self.budget:
                start = time.process_time()
                yield self.progress
                self.step += 1
                self.used += time.process_time() - start
                bar.update(min(round(self.budget), round(self.used)) - bar.n)
                if self.used - last_saved > CHECKPOINT_SECONDS:
                    self.save()
                    last_saved = self.used
        self.save()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        torch.save(
            {
                "state": {name: thing.state_dict() for name, thing in self.state.items()},
                "step": self.step,
                "used": self.used,
            },
            partial,
        )
        os.replace(partial, self.file)


class Averages:
    """Running averages of named figures, written to the log every so many steps."""

    def __init__(self, every: int = 50) -> None:
        self.every, self.count = every, 0
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, stage: Stage, **figures: float) -> None:
        for name, value in figures.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)
        self.count += 1
        if self.count % self.every == 0:
            text = "  ".join(f"{name} {total / n:.3f}" for name, (total, n) in self.sums.items())
            logger.info(
                "%s step %d, %.0f s, rate %.1e: %s",
                stage.file.stem,
                stage.step,
                stage.used,
                stage.rate,
                text,
            )
            self.sums = {}
