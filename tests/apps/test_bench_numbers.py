"""The figures of `kvshare bench reuse`, checked against slow formulas and known answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm import ConfigError, KVShareConfig
from kvshare_mm.apps.bench.divergence import agreement, kl_divergence
from kvshare_mm.apps.bench.methods import METHODS, pick
from kvshare_mm.apps.bench.prompts import read_pairs
from kvshare_mm.apps.bench.reuse import run
from kvshare_mm.apps.bench.rig import Rig, machine, spread

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(10))
_PAIRS = [
    {
        "id": name,
        "donor": f"Laboratory report. Patient number {before}. {_ROWS} What is value {question}?",
        "target": f"Laboratory report. Patient number {after}. {_ROWS} What is value {question}?",
    }
    for name, before, after, question in (("a", 48210, 77, 3), ("b", 5, 61234, 8))
] + [{"id": "unlike", "donor": "The quick brown fox. " * 6, "target": "number " * 30}]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rig(tiny_folder: Path) -> Iterator[Rig]:
    rig = Rig(KVShareConfig.of(model=str(tiny_folder), embedder=None), num_slots=len(METHODS))
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def report(rig: Rig) -> dict[str, Any]:
    return run(rig, _PAIRS, list(METHODS.values()), max_new_tokens=8, repeats=2, progress=False)


def slow_kl(full: list[float], other: list[float]) -> float:
    def log_probs(logits: list[float]) -> list[float]:
        top = max(logits)
        total = math.fsum(math.exp(x - top) for x in logits)
        return [x - top - math.log(total) for x in logits]

    pairs = zip(log_probs(full), log_probs(other), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


_LOGITS = st.floats(-30, 30, width=32)


@settings(max_examples=50)
@given(st.lists(st.tuples(_LOGITS, _LOGITS), min_size=1, max_size=20))
def test_kl_is_the_formula(pairs: list[tuple[float, float]]) -> None:
    full, other = [list(column) for column in zip(*pairs, strict=True)]
    found = kl_divergence(torch.tensor(full), torch.tensor(other))
    assert found == pytest.approx(slow_kl(full, other), rel=1e-6, abs=1e-9)
    assert found >= 0
    assert kl_divergence(torch.tensor(full), torch.tensor(full)) == 0


def test_kl_by_hand() -> None:
    even, uneven = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])
    assert kl_divergence(even, uneven) == pytest.approx(0.5 * math.log(4 / 3))
    assert kl_divergence(uneven, even) == pytest.approx(
        0.75 * math.log(0.75) + 0.25 * math.log(0.25) + math.log(2)
    )
    # A constant added to logits changes no probability.
    assert kl_divergence(uneven, uneven + 7) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("full", "other", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),  # what agrees again later does not count
        ([1, 2, 3, 4], [9, 2, 3, 4], 0),
        ([1, 2, 3, 4], [1], 0.25),
        ([1], [1, 2, 3], 1),
    ],
)
def test_agreement_is_the_common_beginning(full: list[int], other: list[int], share: float) -> None:
    assert agreement(full, other) == share


def test_spread() -> None:
    assert spread([3.0]) == {"mean": 3, "p50": 3, "p90": 3}
    assert spread([float(i) for i in range(11)]) == {"mean": 5, "p50": 5, "p90": 9}


def test_full_is_the_measure_of_all(report: dict[str, Any]) -> None:
    full = report["methods"]["full"]
    assert full["kl_first_token"] == {"mean": 0, "p50": 0, "p90": 0}
    assert full["first_token_agreement"] == full["greedy_agreement"] == 1
    assert full["computed_share"] == full["speedup_vs_full"] == 1


def test_prefix_caching_changes_nothing(report: dict[str, Any]) -> None:
    prefix = report["methods"]["prefix"]
    assert prefix["kl_first_token"]["mean"] < 1e-8
    assert prefix["kl_first_token"]["p90"] < 1e-8
    assert prefix["first_token_agreement"] == prefix["greedy_agreement"] == 1
    assert 0 < prefix["computed_share"] <= 1


def test_methods_compute_what_they_should(report: dict[str, Any]) -> None:
    for pair in report["per_pair"]:
        computed = {name: m["computed_tokens"] for name, m in pair["methods"].items()}
        assert computed["full"] == pair["tokens"]
        assert computed["placeholders"] == min(computed.values())
        if pair["id"] == "unlike":
            # Alike in the head of the chat template only.
            assert min(computed.values()) >= pair["tokens"] - 8
            assert all(m["declined"] for m in pair["methods"].values())
            assert all(m["kl_first_token"] < 1e-8 for m in pair["methods"].values())
        else:
            assert computed["placeholders"] < computed["epic"] < computed["prefix"]
            assert computed["placeholders"] <= computed["kvshare"] < computed["prefix"]
            assert pair["methods"]["placeholders"]["kl_first_token"] > 0


def test_summaries_follow_the_pairs(report: dict[str, Any]) -> None:
    pairs = report["per_pair"]
    assert report["pairs"] == len(pairs) == 3
    assert [p["id"] for p in pairs] == ["a", "b", "unlike"]
    tokens = sum(p["tokens"] for p in pairs)
    for name, summary in report["methods"].items():
        rows = [p["methods"][name] for p in pairs]
        assert summary["computed_share"] == sum(r["computed_tokens"] for r in rows) / tokens
        assert summary["kl_first_token"] == spread([r["kl_first_token"] for r in rows])
        assert summary["ttft_s"]["median"] == sorted(r["ttft_s"] for r in rows)[1]
        assert 0 < summary["ttft_s"]["median"] <= summary["ttft_s"]["p90"]
        assert summary["first_token_agreement"] == sum(r["first_token_same"] for r in rows) / 3
        assert summary["declined"] == sum(r["declined"] is not None for r in rows)
        assert summary["rouge_l"] is summary["bleu"] is None  # no references were given


def test_a_pair_leaves_no_donor_for_the_next(rig: Rig, report: dict[str, Any]) -> None:
    assert report["pairs"] == 3
    assert len(rig.donors.tree) == 0


def test_answers_are_compared_with_references(rig: Rig) -> None:
    [pair] = run(rig, _PAIRS[:1], pick("full"), max_new_tokens=4, progress=False)["per_pair"]
    assert "rouge_l" not in pair["methods"]["full"]
    ids = rig.loaded.tokenizer(_PAIRS[0]["target"])["input_ids"]
    assert len(ids) < pair["tokens"]  # asked through the chat template
    given = [{**_PAIRS[0], "reference": "the number of the fox"}, _PAIRS[1]]
    summary = run(rig, given, pick("full"), max_new_tokens=4, progress=False)["methods"]["full"]
    assert 0 <= summary["rouge_l"] <= 1
    assert 0 <= summary["bleu"] <= 100


def test_pairs_that_do_not_fit_are_skipped_with_a_reason(rig: Rig) -> None:
    long = {"id": "long", "donor": "fox", "target": "a b " * 300}
    odd = {"id": "odd", "donor": 5, "target": "fox"}
    report = run(rig, [long, _PAIRS[0], odd], pick("prefix"), max_new_tokens=4, progress=False)
    assert [s["id"] for s in report["skipped"]] == ["long", "odd"]
    assert "508 tokens" in report["skipped"][0]["reason"]
    assert set(report["methods"]) == {"full", "prefix"}  # full is always measured
    with pytest.raises(ConfigError, match="no pair could be served"):
        run(rig, [long], pick("prefix"), progress=False)


def test_methods_by_name() -> None:
    assert [m.name for m in pick("full, epic")] == ["full", "epic"]
    [own] = pick("repair=window:3+tail:2")
    assert (own.sharing, own.repair) == ("on", "window:3+tail:2")
    assert all(m.repair is None or m.policy is not None for m in METHODS.values())
    for wrong in ("magic", "", "full,", "repair=magic", "repair=window:x"):
        with pytest.raises(ConfigError):
            pick(wrong)


def test_pairs_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"donor": "a", "target": "b"}\n\n{"id": 7, "donor": "c", "target": "d"}\n')
    assert [p["id"] for p in read_pairs(path)] == ["1", 7]
    assert len(read_pairs(path, 1)) == 1
    for content in (b"", b"\n", b"nonsense", b"[1]", b'{"donor": "a"}', b"7", b"\xff\xfe",
                    b'{"donor": "", "target": "b"}'):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"pairs\.jsonl"):
            read_pairs(path)
    with pytest.raises(ConfigError):
        read_pairs(tmp_path)


def test_the_machine_is_described() -> None:
    told = machine()
    assert told["cores"] >= 1
    assert told["memory_gib"] > 0
    assert told["torch"] == torch.__version__
    assert told["cpu"]
