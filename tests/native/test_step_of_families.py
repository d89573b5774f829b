"""A prompt's chunk and an answer in one forward, of models that see, hear or attend otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshare_mm.models.loader import load_model
from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.native.slots import Chunk, SlotRunner

from ..conftest import RANDOM_MODELS
from ..media_models import FAMILIES
from .media_server import ATOL, MAX_LEN, NS, Oracles, medium, say, user


@pytest.mark.parametrize("architecture", RANDOM_MODELS)
def test_of_text(random_model: Callable[[str], Path], architecture: str) -> None:
    loaded = load_model(str(random_model(architecture)), dtype="float32")
    rng = np.random.default_rng(1)
    prompt, answer = rng.integers(0, 128, 150), rng.integers(0, 128, 90)
    outputs = []
    for packed in (False, True):
        runner = SlotRunner(loaded, 3, 256, 64)
        runner.prefill(2, answer, np.arange(len(answer)))
        runner.prefill(1, prompt, np.arange(100))
        rows = ([2, 2], [5, 9], [len(answer), len(answer) + 1])
        compute = np.array([*range(70, 75), *range(100, len(prompt))])
        if packed:
            outputs.append(runner.step(Chunk(1, prompt, compute), *rows))
        else:
            one = runner.prefill(1, prompt, compute)
            outputs.append(torch.cat((one[None], runner.decode(*rows))))
    assert torch.allclose(outputs[0], outputs[1], atol=ATOL)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_media(oracles: Oracles, family: str) -> None:
    oracle = oracles(family)
    encoder = MediaEncoder(oracle.loaded, None)
    outputs = []
    for packed in (False, True):
        runner = SlotRunner(oracle.loaded, 2, MAX_LEN, 4096)
        streams = [
            oracle.stream(user(medium(family, kind), say("What is it? Order 48213, and more.")))
            for kind in (0, 1)
        ]
        chunks = []
        for slot, stream in enumerate(streams):
            features = tuple(
                (s.start, encoder.features(item, NS)[0])
                for s, item in zip(stream.media, stream.items, strict=True)
            )
            n = len(stream)
            end = n if slot == 0 else max(s.end for s in stream.media)
            media = MediaInputs(stream.positions, features)
            runner.prefill(slot, stream.token_ids, np.arange(end), None, media)
            chunks.append(
                Chunk(
                    slot, stream.token_ids, np.arange(end, n), None, MediaInputs(stream.positions)
                )
            )
        first, chunk = streams[0], chunks[1]
        assert runner.packs(chunk) and len(chunk.compute) > 3
        n = len(first)
        rows = ([0, 0], [5, 9], [n, n + 1], [first.rope_delta] * 2)
        if packed:
            outputs.append(runner.step(chunk, *rows))
        else:
            one = runner.prefill(1, chunk.token_ids, chunk.compute, None, chunk.media)
            outputs.append(torch.cat((one[None], runner.decode(*rows))))
    assert torch.allclose(outputs[0], outputs[1], atol=ATOL)
