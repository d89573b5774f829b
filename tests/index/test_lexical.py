"""The lexical index ranks by shared n-grams, whatever is common to all records."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.index import lexical
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.lexical import LexicalIndex
from kvshare_mm.index.ngrams import ngram_hashes

from ..helpers import in_threads


def record(node_id: str, tokens: np.ndarray | list[int], namespace: str = "ns") -> IndexRecord:
    return IndexRecord(node_id, namespace, np.asarray(tokens, dtype=np.uint64))


def found(index: LexicalIndex, tokens: np.ndarray | list[int], limit: int = 4) -> list[str]:
    candidates = index.search("ns", np.asarray(tokens, dtype=np.uint64), limit)
    return [candidate.node_id for candidate in candidates]


def tokens_of(rng: np.random.Generator, count: int, vocab: int = 50_000) -> np.ndarray:
    return rng.integers(0, vocab, count)


class Template:
    """One long form with six fields of ten tokens."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.parts = np.split(tokens_of(rng, 300), 6)

    def fill(self, fields: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(
            [x for part, field in zip(self.parts, fields, strict=True) for x in (part, field)]
        )


def test_the_record_that_shares_most_comes_first() -> None:
    rng = np.random.default_rng(0)
    prompt = tokens_of(rng, 100)
    index = LexicalIndex()
    index.add([record(f"other{i}", tokens_of(rng, 100)) for i in range(50)])
    index.add([record("half", np.concatenate([prompt[:50], tokens_of(rng, 50)]))])
    index.add([record("most", np.concatenate([tokens_of(rng, 10), prompt[10:]]))])
    assert found(index, prompt) == ["most", "half"]
    assert found(index, prompt, limit=1) == ["most"]
    assert found(index, prompt, limit=0) == []


@pytest.mark.parametrize("budget", [32768, 2000, 1])
def test_in_a_pool_of_one_template_the_shared_fields_decide(budget: int) -> None:
    rng = np.random.default_rng(1)
    template = Template(rng)
    forms = [[tokens_of(rng, 10) for _ in range(6)] for _ in range(400)]
    index = LexicalIndex(budget=budget)
    index.add([record(str(i), template.fill(form)) for i, form in enumerate(forms)])
    for i in range(0, 400, 37):
        fields = [*forms[i][:2], *(tokens_of(rng, 10) for _ in range(4))]
        assert found(index, template.fill(fields))[0] == str(i)


def test_a_template_of_half_the_pool_does_not_hide_its_older_records() -> None:
    rng = np.random.default_rng(2)
    template = Template(rng)
    forms = [[tokens_of(rng, 10) for _ in range(6)] for _ in range(300)]
    index = LexicalIndex(budget=2000)
    for i, form in enumerate(forms):
        index.add([record(f"form{i}", template.fill(form)), record(f"x{i}", tokens_of(rng, 100))])
    fields = [*forms[7][:1], *(tokens_of(rng, 10) for _ in range(5))]
    assert found(index, template.fill(fields))[0] == "form7"


def test_of_identical_records_the_newest_come_first() -> None:
    index = LexicalIndex(budget=50)
    for i in range(40):
        index.add([record(str(i), list(range(30)))])
    assert found(index, list(range(30))) == ["39", "38", "37", "36"]


def test_common_ngrams_are_found_when_all_the_newest_records_are_removed() -> None:
    index = LexicalIndex(budget=50)
    index.add([record(str(i), list(range(30))) for i in range(400)])
    index.remove([str(i) for i in range(310, 400)])
    assert found(index, list(range(30))) == ["309", "308", "307", "306"]


def test_adding_a_known_id_replaces_it() -> None:
    index = LexicalIndex()
    index.add([record("a", [1, 2, 3, 4, 5])])
    index.add([record("a", [6, 7, 8, 9]), record("a", [11, 12, 13, 14])])
    assert len(index) == 1
    assert found(index, [1, 2, 3, 4, 5]) == []
    assert found(index, [6, 7, 8, 9]) == []
    assert found(index, [11, 12, 13, 14]) == ["a"]
    index.add([record("a", [11, 12, 13, 14], namespace="other")])
    assert found(index, [11, 12, 13, 14]) == []


def test_namespaces_never_leak() -> None:
    index = LexicalIndex()
    prompt = list(range(50))
    index.add([record("mine", prompt[:10]), record("theirs", prompt, namespace="secret")])
    assert found(index, prompt) == ["mine"]
    index.remove(["mine"])
    assert found(index, prompt) == []
    assert index.search("nobody", np.arange(50, dtype=np.uint64), 4) == []


@pytest.mark.parametrize("budget", [32768, 500, 1])
def test_among_many_records_and_few_the_same_is_found(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    rng = np.random.default_rng(5)
    templates = [Template(rng) for _ in range(3)]
    prompts = [
        templates[i % 3].fill([tokens_of(rng, 10, vocab=12) for _ in range(6)]) for i in range(90)
    ]
    index = LexicalIndex(budget=budget)
    index.add([record(str(i), prompt) for i, prompt in enumerate(prompts)])
    index.remove([str(i) for i in range(0, 90, 7)])
    answers = []
    for many in (0, 1 << 40):
        monkeypatch.setattr(lexical, "_MANY", many)
        answers.append([index.search("ns", np.asarray(p, np.uint64), 5) for p in prompts])
    assert answers[0] == answers[1]


def test_sampled_long_prompts_compare_with_short_ones() -> None:
    rng = np.random.default_rng(4)
    long, short = tokens_of(rng, 4000), tokens_of(rng, 400)
    ratios = []
    for index in (LexicalIndex(), LexicalIndex(max_ngrams=500, max_query_ngrams=300)):
        index.add([record("long", np.concatenate([long[:2000], tokens_of(rng, 2000)]))])
        index.add([record("short", short), record("shorter", long[:400])])
        ranked = index.search("ns", long.astype(np.uint64), 4)
        assert [candidate.node_id for candidate in ranked] == ["long", "shorter"]
        ratios.append(ranked[0].score / ranked[1].score)
    assert ratios[1] == pytest.approx(ratios[0], rel=0.4)


@given(
    stored=st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=12),
    removed=st.sets(st.integers(0, 11)),
    query=st.lists(st.integers(0, 4), max_size=12),
    one_by_one=st.booleans(),
)
def test_scores_are_those_of_a_brute_force_count(
    stored: list[list[int]], removed: set[int], query: list[int], one_by_one: bool
) -> None:
    index = LexicalIndex(n=2)
    records = [record(str(i), tokens) for i, tokens in enumerate(stored)]
    for batch in [[r] for r in records] if one_by_one else [records]:
        index.add(batch)
    index.remove([str(i) for i in removed])
    # Until they are compacted away, removed records still count in the weights: compare the scores
    # of an index that never had them.
    fresh = LexicalIndex(n=2)
    fresh.add([r for i, r in enumerate(records) if i not in removed])

    def ngrams(tokens: list[int]) -> set[int]:
        return set(ngram_hashes(np.array(tokens, dtype=np.uint64), 2).tolist())

    kept = {i: ngrams(tokens) for i, tokens in enumerate(stored) if i not in removed}
    frequency = {g: sum(g in grams for grams in kept.values()) for g in ngrams(query)}
    expected = {
        str(i): sum(math.log((len(kept) + 1) / frequency[g]) for g in grams & ngrams(query))
        for i, grams in kept.items()
        if grams & ngrams(query)
    }
    keys = np.array(query, dtype=np.uint64)
    ranked = fresh.search("ns", keys, 20)
    assert {c.node_id: pytest.approx(c.score) for c in ranked} == expected
    assert [c.score for c in ranked] == sorted((c.score for c in ranked), reverse=True)
    assert {c.node_id for c in index.search("ns", keys, 20)} == set(expected)
    assert len(index) == len(fresh) == len(kept)


def test_many_threads_can_use_one_index() -> None:
    rng = np.random.default_rng(5)
    prompts = [tokens_of(rng, 60) for _ in range(300)]
    index = LexicalIndex()

    def work(offset: int) -> None:
        for i in range(offset, 300, 3):
            index.add([record(str(i), prompts[i])])
            assert found(index, prompts[i]) == [str(i)]
            if i % 2:
                index.remove([str(i)])

    in_threads(work, range(3))
    assert len(index) == 150
    assert all(found(index, prompts[i]) == ([] if i % 2 else [str(i)]) for i in range(300))


def test_parameters_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LexicalIndex(budget=0)
