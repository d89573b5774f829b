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


def _assert_filled(runner: SlotRunner, slot: int, full: Any) -> None:
    n = full.k.shape[2]
    for tensor, want in zip(runner.slot_kv(slot), (full.k, full.v), strict=True):
        assert torch.allclose(tensor[:, :, :n], want, atol=ATOL, rtol=0)
        assert tensor[:, :, n:].isnan().all(), "written beyond the prompt"


@pytest.mark.parametrize("n", [1, 2, 17, MAX_LEN])
def test_computing_everything_is_a_prefill(tiny: Any, n: int) -> None:
    ids = _ids(n)
    full, runner = tiny.full(ids), _runner(tiny)
    logits = runner.prefill(1, ids, np.arange(n))
    assert logits.shape == (128,)
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    _assert_filled(runner, 1, full)
    assert all(tensor.isnan().all() for tensor in runner.slot_kv(0))


@settings(max_examples=40)
@given(data=st.data())
def test_any_positions_over_an_exact_donor(tiny: Any, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    chosen = data.draw(st.sets(st.integers(0, n - 1)))
    chunk = data.draw(st.sampled_from([1, 2, 7, 4096]))
    slot = data.draw(st.integers(0, 1))
    compute = np.array(sorted(chosen | {n - 1}))
    ids = _ids(n, seed=n)
    full, runner = tiny.full(ids), _runner(tiny, chunk=chunk)
    _plant(runner, slot, full, compute)
    kept = np.setdiff1d(np.arange(n), compute)
    logits = runner.prefill(slot, ids, compute)
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    _assert_filled(runner, slot, full)
    # What is kept is not rewritten, not even with nearly the same.
    for tensor, source in zip(runner.slot_kv(slot), (full.k, full.v), strict=True):
        assert torch.equal(tensor[:, :, kept], source[:, :, kept])
    assert all(tensor.isnan().all() for tensor in runner.slot_kv(1 - slot))


@pytest.mark.parametrize("chunk", [1, 5, 16, 30])
@pytest.mark.parametrize("pattern", ["all", "scattered", "runs", "tail"])
def test_chunks_change_nothing(tiny: Any, chunk: int, pattern: str) -> None:
    n = 60
    ids, other = _ids(n), _ids(n, seed=7)
    compute = {
        "all": np.arange(n),
        "scattered": np.append(np.arange(1, n - 1, 3), n - 1),
        "runs": np.r_[5:15, 28:50, n - 1],
        "tail": np.arange(n - 25, n),
    }[pattern]
    # Kept KV of another text: reuse that is not exact must not depend on chunks either.
    whole, parts = _runner(tiny), _runner(tiny, chunk=chunk)
    for runner in (whole, parts):
        _plant(runner, 0, tiny.full(other), compute)
    want, got = whole.prefill(0, ids, compute), parts.prefill(0, ids, compute)
    assert torch.allclose(got, want, atol=ATOL, rtol=0)
    for a, b in zip(whole.slot_kv(0), parts.slot_kv(0), strict=True):
        assert torch.allclose(a[:, :, :n], b[:, :, :n], atol=ATOL, rtol=0)


def test_a_computed_position_never_sees_a_later_key(tiny: Any) -> None:
    """The KV of a position depends on nothing that stands behind it."""
    ids = _ids(40)
    compute = np.r_[4:10, 20:23, 39]
    states = []
    for seed in (1, 2):
        later = ids.copy()
        later[23:] = _ids(17, seed=seed)
        runner = _runner(tiny)
        _plant(runner, 0, tiny.full(later), compute)
        runner.prefill(0, later, compute)
        states.append([tensor[:, :, :23].clone() for tensor in runner.slot_kv(0)])
    for a, b in zip(*states, strict=True):
        assert torch.allclose(a, b, atol=ATOL, rtol=0)


@torch.inference_mode()
def test_a_computed_position_sees_all_earlier_ones(tiny: Any) -> None:
    """Against transformers with its own cache, where what is kept is not exact."""
    ids, n, kept = _ids(40), 40, 25
    other = tiny.full(_ids(n, seed=3))
    runner = _runner(tiny)
    _plant(runner, 0, other, np.arange(kept, n))
    logits = runner.prefill(0, ids, np.arange(kept, n))
    cache = DynamicCache(config=tiny.reference.config)
    for layer in range(len(other.k)):
        cache.update(
            other.k[layer : layer + 1, :, :kept], other.v[layer : layer + 1, :, :kept], layer
        )
    want = tiny.reference(
        input_ids=torch.from_numpy(ids[kept:])[None], past_key_values=cache, use_cache=True
    ).logits[0, -1]
    assert torch.allclose(logits, want, atol=ATOL, rtol=0)


# -- decode ---------------------------------------------------------------------------------


def _answer(runner: SlotRunner, slot: int, ids: np.ndarray, num_tokens: int) -> list[int]:
    tokens = [int(runner.prefill(slot, ids, np.arange(len(ids))).argmax())]
    while len(tokens) < num_tokens:
        logits = runner.decode([slot], [tokens[-1]], [len(ids) + len(tokens) - 1])
        tokens.append(int(logits[0].argmax()))
    return tokens


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
    ids, num_tokens = _ids(20), 8
    want = tiny.greedy(ids, num_tokens)
    runner = _runner(tiny, 3)
    first = runner.prefill(1, ids, np.arange(20))
    tokens = [int(first.argmax())]
    for step in range(num_tokens - 1):
        for other in (0, 2):
            for tensor in runner.slot_kv(other):
                tensor.fill_(NAN)
            runner.prefill(other, _ids(30 + step, seed=step), np.arange(30 + step))
        logits = runner.decode(
            [0, 1, 2], [1, tokens[-1], 2], [30 + step, 19 + len(tokens), 30 + step]
        )
        tokens.append(int(logits[1].argmax()))
    assert tokens == want


def test_a_slot_can_be_used_again_for_a_shorter_prompt(tiny: Any) -> None:
    runner = _runner(tiny)
    _answer(runner, 0, _ids(60), 6)
    runner.release(0)
    short = _ids(8, seed=5)
    assert _answer(runner, 0, short, 6) == tiny.greedy(short, 6)


def test_prefill_between_decode_steps(tiny: Any) -> None:
    """The layout of one forward is not left over for the next."""
    runner = _runner(tiny)
    a, b = _ids(12, 1), _ids(25, 2)
    tokens = {0: [int(runner.prefill(0, a, np.arange(12)).argmax())], 1: []}
    tokens[0].append(int(runner.decode([0], [tokens[0][-1]], [12])[0].argmax()))
    tokens[1].append(int(runner.prefill(1, b, np.arange(25)).argmax()))
    for _ in range(4):
        logits = runner.decode(
            [0, 1], [tokens[0][-1], tokens[1][-1]], [11 + len(tokens[0]), 24 + len(tokens[1])]
        )
        for slot in (0, 1):
            tokens[slot].append(int(logits[slot].argmax()))
    assert tokens[0] == tiny.greedy(a, 6)
    assert tokens[1] == tiny.greedy(b, 5)


# -- the bench's measure of drift -----------------------------------------------------------


@torch.inference_mode()
def _slow_deviation(
    tiny: Any, k: torch.Tensor, v: torch.Tensor, ids: np.ndarray, start: int, layer: int
) -> np.ndarray:
    """Transformers over ``ids[start:]`` behind the slot's KV, then one norm a position."""
    cache = DynamicCache(config=tiny.reference.config)
    if start:
        for i in range(len(k)):
            cache.update(k[i : i + 1, :, :start], v[i : i + 1, :, :start], i)
    tiny.reference(
        input_ids=torch.from_numpy(ids[start:])[None], past_key_values=cache, use_cache=True
    )
    new = cache.layers[layer].values[0]
    out = np.zeros(len(ids), np.float32)
    for position in range(start, len(ids)):
        out[position] = float((new[:, position] - v[layer, :, position]).norm())
    return out


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 1, 14, 49])
def test_value_deviation(tiny: Any, layer: int, start: int) -> None:
    ids, slot = _ids(50), 1
    edited = tiny.full(_ids(50, seed=9))
    runner = _runner(tiny, chunk=16)
    _plant(runner, slot, edited, np.empty(0, np.int64))
    before = [tensor.clone() for tensor in runner.slot_kv(slot)]
    got = value_deviation(tiny.loaded, runner.slot_kv(slot), ids, start, layer)
    assert got.dtype == np.float32 and got.shape == (50,)
    assert np.allclose(got, _slow_deviation(tiny, edited.k, edited.v, ids, start, layer), atol=ATOL)
    assert not got[:start].any()
    for tensor, was in zip(runner.slot_kv(slot), before, strict=True):
        assert torch.equal(tensor[:, :, :50], was[:, :, :50]), "measuring changed the slot"
    assert all(tensor.isnan().all() for tensor in runner.slot_kv(0))


def test_an_exact_donor_does_not_deviate(tiny: Any) -> None:
    ids = _ids(40)
    runner = _runner(tiny)
    _plant(runner, 0, tiny.full(ids), np.empty(0, np.int64))
    assert value_deviation(tiny.loaded, runner.slot_kv(0), ids, 10, 1).max() < ATOL


def test_positions_without_kv_do_not_spoil_the_others(tiny: Any) -> None:
    """Placeholders hold garbage when drift is measured."""
    ids = _ids(40)
    runner, edited, holes = _runner(tiny), tiny.full(_ids(40, seed=4)), np.r_[12:15, 30, 39]
    _plant(runner, 0, edited, holes)
    got = value_deviation(tiny.loaded, runner.slot_kv(0), ids, 8, 1)
    want = _slow_deviation(tiny, edited.k, edited.v, ids, 8, 1)
    kept = np.setdiff1d(np.arange(40), holes)
    assert np.allclose(got[kept], want[kept], atol=ATOL)


def test_prefill_after_a_measurement(tiny: Any) -> None:
    ids = _ids(40)
    full, runner, compute = tiny.full(ids), _runner(tiny), np.r_[12:15, 30, 39]
    _plant(runner, 0, full, compute)
    value_deviation(tiny.loaded, runner.slot_kv(0), ids, 12, 1)
    logits = runner.prefill(0, ids, compute)
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    _assert_filled(runner, 0, full)
