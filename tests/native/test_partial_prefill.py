"""PartialAttention in numbers: it computes what transformers computes, and nothing leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvshare_mm.apps.bench.drift import value_deviation
from kvshare_mm.native.slots import SlotRunner

MAX_LEN = 80
ATOL = 1e-4
NAN = float("nan")


def _ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, n)


def _runner(tiny: Any, num_slots: int = 2, chunk: int = 4096) -> SlotRunner:
    """A runner whose slots hold NaN everywhere: whatever is read unwritten shows."""
    runner = SlotRunner(tiny.loaded, num_slots, MAX_LEN, chunk)
    for slot in range(num_slots):
        for tensor in runner.slot_kv(slot):
            tensor.fill_(NAN)
    return runner


def _plant(runner: SlotRunner, slot: int, full: Any, compute: np.ndarray) -> None:
    """Put the exact KV of all positions but `compute` into a slot, and NaN everywhere else."""
    n = full.k.shape[2]
    for tensor, source in zip(runner.slot_kv(slot), (full.k, full.v), strict=True):
        tensor.fill_(NAN)
        tensor[:, :, :n] = source
        tensor[:, :, compute] = NAN


def _behind(tiny: Any, k: torch.Tensor, v: torch.Tensor, ids: np.ndarray, start: int) -> Any:
    """Transformers over ``ids[start:]`` behind that much KV: its logits, and its cache."""
    cache = DynamicCache(config=tiny.reference.config)
    for i in range(len(k) if start else 0):
        cache.update(k[i : i + 1, :, :start], v[i : i + 1, :, :start], i)
    new = torch.from_numpy(ids[start:])[None]
    with torch.inference_mode():
        return tiny.reference(input_ids=new, past_key_values=cache, use_cache=True).logits, cache


@settings(max_examples=50)
@given(data=st.data())
def test_any_positions_over_an_exact_donor(tiny: Any, data: st.DataObject) -> None:
    """A position that saw a later key, or not all earlier ones, would be off; so would KV of a
    chunk. The whole prompt is one of the cases."""
    n = data.draw(st.one_of(st.sampled_from([1, 2, 17, MAX_LEN]), st.integers(1, 60)))
    chosen = data.draw(st.one_of(st.just(set(range(n))), st.sets(st.integers(0, n - 1))))
    chunk = data.draw(st.sampled_from([1, 2, 7, 30, 4096]))
    slot = data.draw(st.integers(0, 1))
    compute = np.array(sorted(chosen | {n - 1}))
    ids = _ids(n, seed=n)
    full, runner = tiny.full(ids), _runner(tiny, chunk=chunk)
    _plant(runner, slot, full, compute)
    kept = np.setdiff1d(np.arange(n), compute)
    logits = runner.prefill(slot, ids, compute)
    assert logits.shape == full.logits[-1].shape
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    for tensor, want in zip(runner.slot_kv(slot), (full.k, full.v), strict=True):
        assert torch.allclose(tensor[:, :, :n], want, atol=ATOL, rtol=0)
        assert tensor[:, :, n:].isnan().all(), "written beyond the prompt"
        # What is kept is not rewritten, not even with nearly the same.
        assert torch.equal(tensor[:, :, kept], want[:, :, kept])
    assert all(tensor.isnan().all() for tensor in runner.slot_kv(1 - slot))


@pytest.mark.parametrize("chunk", [4, 4096])
def test_a_computed_position_sees_all_earlier_ones(tiny: Any, chunk: int) -> None:
    """Against transformers with its own cache, where what is kept is not exact."""
    ids, n, kept = _ids(40), 40, 25
    other = tiny.full(_ids(n, seed=3))
    runner = _runner(tiny, chunk=chunk)
    _plant(runner, 0, other, np.arange(kept, n))
    logits = runner.prefill(0, ids, np.arange(kept, n))
    want, _ = _behind(tiny, other.k, other.v, ids, kept)
    assert torch.allclose(logits, want[0, -1], atol=ATOL, rtol=0)


# -- decode ---------------------------------------------------------------------------------


def test_batched_decode_is_one_by_one(tiny: Any) -> None:
    prompts = {2: _ids(5, 1), 0: _ids(33, 2), 3: _ids(1, 3)}
    alone, together = _runner(tiny, 4), _runner(tiny, 4)
    tokens, logits = {}, {}
    for slot, ids in prompts.items():
        for runner in (alone, together):
            logits[slot] = runner.prefill(slot, ids, np.arange(len(ids)))
        tokens[slot] = [int(logits[slot].argmax())]
    active = list(prompts)
    for step in range(10):
        if step == 6:
            active.remove(0)  # one is done, the others go on
        if step == 8:
            active.reverse()
        last = [tokens[s][-1] for s in active]
        at = [len(prompts[s]) + len(tokens[s]) - 1 for s in active]
        got = together.decode(active, last, at)
        for row, slot, token, position in zip(got, active, last, at, strict=True):
            want = alone.decode([slot], [token], [position])[0]
            assert torch.allclose(row, want, atol=ATOL, rtol=0)
            tokens[slot].append(int(row.argmax()))
    for slot, ids in prompts.items():
        assert tokens[slot] == tiny.greedy(ids, len(tokens[slot]))
    assert all(tensor.isnan().all() for tensor in together.slot_kv(1))


def test_slots_do_not_see_each_other(tiny: Any) -> None:
    """Others are prefilled between the steps; then the slot is used again for a shorter prompt."""
    runner = _runner(tiny, 3)
    for n in (20, 8):
        ids = _ids(n, seed=n)
        tokens = [int(runner.prefill(1, ids, np.arange(n)).argmax())]
        for step in range(7):
            for other in (0, 2):
                for tensor in runner.slot_kv(other):
                    tensor.fill_(NAN)
                runner.prefill(other, _ids(30 + step, seed=step), np.arange(30 + step))
            at = [30 + step, n - 1 + len(tokens), 30 + step]
            logits = runner.decode([0, 1, 2], [1, tokens[-1], 2], at)
            tokens.append(int(logits[1].argmax()))
        assert tokens == tiny.greedy(ids, 8)
        runner.release(1)


# -- the bench's measure of drift -----------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 1, 14, 49])
def test_value_deviation(tiny: Any, layer: int, start: int) -> None:
    """One norm a position; placeholders hold garbage, which spoils nothing else."""
    ids, slot = _ids(50), 1
    holes = np.array([at for at in (15, 16, 17, 30, 48) if at >= start], np.int64)
    edited, runner = tiny.full(_ids(50, seed=9)), _runner(tiny, chunk=16)
    _plant(runner, slot, edited, holes)
    before = [tensor.clone() for tensor in runner.slot_kv(slot)]
    got = value_deviation(tiny.loaded, runner.slot_kv(slot), ids, start, layer)
    assert got.dtype == np.float32 and got.shape == (50,)
    new = _behind(tiny, edited.k, edited.v, ids, start)[1].layers[layer].values[0]
    want = (new - edited.v[layer]).norm(dim=-1).norm(dim=0).numpy()
    want[:start] = 0
    kept = np.setdiff1d(np.arange(50), holes)
    assert np.allclose(got[kept], want[kept], atol=ATOL)
    for tensor, was in zip(runner.slot_kv(slot), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), was.nan_to_num()), "measuring changed the slot"
    assert all(tensor.isnan().all() for tensor in runner.slot_kv(0))
