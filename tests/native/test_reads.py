"""Which far positions are read, against transformers' own attention; which heads are watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.kernels.scoring import PLAIN, Scoring
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.reads import LEAST, NEAR, PROBE, Reads, reading_heads, telling

HEADS = {0: (0, 2), 1: (1,)}
# No token is said twice: all that is read tells something.
KEYS = np.arange(90, dtype=np.uint64)


@pytest.mark.parametrize("chunk", [7, 512])
def test_pairs_are_those_of_transformers_attention(tiny: Any, chunk: int) -> None:
    ids = np.random.default_rng(0).integers(3, 200, 90)
    runner = SlotRunner(tiny.loaded, 2, 128, chunk)
    reads = Reads(HEADS)
    runner.prefill(1, ids, np.arange(len(ids)), reads=reads.add)

    tiny.reference.set_attn_implementation("eager")
    with torch.inference_mode():
        found = tiny.reference(torch.from_numpy(ids)[None], output_attentions=True).attentions
    most = torch.stack([found[layer][0, head] for layer in HEADS for head in HEADS[layer]]).amax(0)
    expected = [(i, j) for i, j in (most >= LEAST).nonzero().tolist() if 0 < j <= i - NEAR]
    assert expected, "nothing is read: the test shows nothing"
    assert reads.pairs(KEYS).tolist() == [list(pair) for pair in expected]
    assert reads.pairs(KEYS).dtype == np.int32
    few = (ids % 9).astype(np.uint64)
    tells = telling(np.array(expected), few)
    told = [pair for pair, does in zip(expected, tells, strict=True) if does]
    assert 0 < len(told) < len(expected)
    assert reads.pairs(few).tolist() == [list(pair) for pair in told]


def test_of_some_positions_only_what_they_read(tiny_llama: Any) -> None:
    ids = np.random.default_rng(1).integers(3, 200, 90)
    runner = SlotRunner(tiny_llama.loaded, 1, 128, 512)
    whole, part = Reads(HEADS), Reads(HEADS)
    runner.prefill(0, ids, np.arange(len(ids)), reads=whole.add)
    some = np.array([20, 33, 34, 60, 89])
    runner.prefill(0, ids, some, reads=part.add)
    found = [pair for pair in whole.pairs(KEYS).tolist() if pair[0] in some]
    assert found and part.pairs(KEYS).tolist() == found


def test_layers_that_do_not_see_all_before_read_nothing_far() -> None:
    reads = Reads({0: (0,)})
    query, key = torch.ones(1, 40, 4), torch.zeros(1, 40, 4)
    key[:, 5] = 9
    for scoring, count in ((Scoring(window=24), 0), (Scoring(softcap=50.0), 40 - 5 - NEAR)):
        reads.add(0, query, key, torch.arange(40), 1.0, scoring)
        assert len(reads.pairs(KEYS[:40])) == count


def test_a_head_that_looks_at_its_sink_reads_nothing() -> None:
    query, key = torch.ones(1, 40, 4), torch.zeros(1, 40, 4)
    key[:, 5] = 9
    for sink, count in ((-9.0, 40 - 5 - NEAR), (99.0, 0)):
        reads = Reads({0: (0,)})
        sinks = Scoring(sinks=torch.tensor([sink]))
        reads.add(0, query, key, torch.arange(40), 1.0, sinks)
        assert len(reads.pairs(KEYS[:40])) == count


@pytest.mark.parametrize(
    ("text", "reader", "read", "told"),
    [
        # A status is looked up where it is not said.
        ("status : closed . told the status of it", 7, 2, True),
        # The text repeats itself: what is read stands behind the reader,
        ("a user : hi . a user : hi", 7, 3, False),
        # or another value in its place, or it is the reader itself.
        ("sodium : 121 . sodium : 135", 5, 2, False),
        ("a closed b c d closed", 5, 1, False),
        # What comes behind the prompt's end nobody knows.
        ("status : closed and a status :", 6, 2, False),
        ("status : closed and a status", 5, 2, True),
    ],
)
def test_what_repeats_itself_tells_nothing(text: str, reader: int, read: int, told: bool) -> None:
    words = text.split()
    keys = np.array([words.index(word) for word in words], np.uint64)
    assert telling(np.array([[reader, read]]), keys).tolist() == [told]


@pytest.mark.parametrize("vocab", [1, 3, 50])
def test_the_probe_has_tokens_of_any_vocabulary(vocab: int) -> None:
    seen = []
    assert reading_heads(lambda ids, _: seen.append(ids), vocab) == {}
    assert seen[0].min() >= 0
    assert seen[0].max() < vocab


def test_a_model_that_fails_in_the_probe_serves_without(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SlotRunner(tiny_llama.loaded, 1, 2 * PROBE, 512)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such tokens")

    monkeypatch.setattr(runner, "_forward", fail)
    assert runner.reading_heads == {}


def test_nothing_computed_reads_nothing() -> None:
    assert Reads(HEADS).pairs(KEYS).shape == (0, 2)


def test_heads_that_look_up_what_stood_before_are_chosen() -> None:
    """Of a head that attends to what followed the same token before, and one that does not."""

    def probe(ids: torch.Tensor, recorder: Any) -> None:
        n = len(ids)
        assert n == 2 * PROBE and torch.equal(ids[:PROBE], ids[PROBE:])
        key = torch.eye(n)[None].repeat(2, 1, 1)
        query = torch.zeros(4, n, n)
        for i in range(PROBE, n):
            query[2, i, i - PROBE + 1] = 30.0  # heads 2 and 3 share the second head of K
            query[1, i, i - 1] = 30.0
        for layer in range(3):
            recorder(layer, query if layer == 1 else query * 0, key, torch.arange(n), 1.0, PLAIN)

    assert reading_heads(probe, 1000) == {1: (2,)}


def test_a_random_model_has_none(tiny_llama: Any) -> None:
    assert SlotRunner(tiny_llama.loaded, 1, 2 * PROBE, 512).reading_heads == {}
    assert SlotRunner(tiny_llama.loaded, 1, PROBE, 512).reading_heads == {}


def test_no_rows_read_nothing() -> None:
    """A chunk may hold rows of a picture alone, which are not told."""
    reads = Reads(HEADS)
    none = torch.zeros(0, dtype=torch.int64)
    reads.add(0, torch.zeros(4, 0, 8), torch.zeros(2, 90, 8), none, 1.0)
    assert len(reads.pairs(KEYS)) == 0
