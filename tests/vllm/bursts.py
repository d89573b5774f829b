"""Requests that come at about the same time, for properties that hold whatever comes."""

from __future__ import annotations

from hypothesis import strategies as st

from .engines import edited, ids

# Prompts with the lengths of their answers, how they reuse, and the steps before the next one.
Burst = list[tuple[list[int], int, str, int]]

BASES = [ids(length, 50 + length) for length in (150, 260, 330)]


@st.composite
def bursts(draw: st.DrawFn) -> Burst:
    """Prompts that resemble each other, with how they share, and steps between arrivals."""
    made = []
    for _ in range(draw(st.integers(2, 6))):
        prompt = draw(st.sampled_from(BASES))
        for _ in range(draw(st.integers(0, 2))):
            prompt = edited(prompt, draw(st.integers(0, len(prompt))), draw(st.integers(1, 9)))
        prompt = prompt[draw(st.integers(0, 20)) :]
        reuse = draw(st.sampled_from(["similar", "similar", "exact", "off"]))
        made.append((prompt, draw(st.integers(1, 40)), reuse, draw(st.integers(0, 4))))
    return made
