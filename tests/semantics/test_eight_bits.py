"""Donors kept in eight bits: found and edited as others, with what rounding does, and apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvshare_mm.kernels.q8 import unpack
from kvshare_mm.store.base import NodeKV

from .engines import Engine, Native, nodes, told
from .test_requests import DONOR, EDITED, LOOSE, N


@pytest.fixture(scope="module")
def packed(start: Callable[..., Engine], random_model: Callable[[str], Path]) -> Iterator[Engine]:
    engine = start(random_model("llama"), donor_dtype="q8_0")
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "reused"), [(DONOR, (N - 1, 0, 1)), (EDITED, (60, 139, 6))], ids=["the same", "edit"]
)
def test_answers_are_those_of_rounded_kv(
    packed: Engine, random_model: Callable[[str], Path], prompt: list[int], reused: tuple[int, ...]
) -> None:
    whole = Native(random_model("llama"))
    for engine in (packed, whole):
        engine.forget()
        engine.ask(DONOR)
    (node,) = nodes(whole)
    stored = whole.store.get(node.node_id, node.namespace)
    kv = NodeKV.packed(stored.kv.k, stored.kv.v)
    dims = stored.kv.k.shape[-1], stored.kv.v.shape[-1]
    rounded = NodeKV(
        unpack(kv.k, dims[0], torch.float32, kv.k_exponents), unpack(kv.v, dims[1], torch.float32)
    )
    whole.store.put(replace(stored, kv=rounded))
    answers = [engine.ask(prompt, **LOOSE) for engine in (packed, whole)]
    whole.close()
    assert [told(answer) for answer in answers] == [reused, reused]
    first, other = (dict(answer.logprobs[0].top) for answer in answers)  # type: ignore[index]
    both = first.keys() & other.keys()
    assert len(both) > 10
    assert max(abs(first[token] - other[token]) for token in both) < packed.precision


def test_they_take_half_the_bytes_of_16_bits(packed: Engine) -> None:
    packed.forget()
    packed.ask(DONOR)
    (node,) = nodes(packed)
    kv = packed.store.get(node.node_id, node.namespace).kv
    assert kv.k.dtype == torch.int8 and kv.k.shape[3] % 34 == 0
    values = kv.k.shape[3] // 34 * 32 * kv.k[..., 0].numel() * 2
    assert kv.k_exponents is not None
    assert kv.num_bytes == pytest.approx(values * 34 / 32 + kv.k_exponents.numel())


def test_whole_and_packed_donors_of_a_folder_are_apart(
    random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    kinds = ("auto", "q8_0", "auto")
    told_by = []
    for donor_dtype in kinds:
        engine = Native(random_model("llama"), store_dir=tmp_path, donor_dtype=donor_dtype)
        told_by.append(told(engine.ask(DONOR)))
        assert engine.store.flush(60)
        engine.close()
    assert told_by == [(0, 0, N), (0, 0, N), (N - 1, 0, 1)]
