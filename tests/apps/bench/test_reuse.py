"""The figures of `kvshare bench reuse`, checked against slow formulas and known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.apps.bench.methods import METHODS, pick
from kvshare_mm.apps.bench.reuse import run
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.machine import machine


@pytest.fixture(scope="module")
def report(rig: Rig, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return run(rig, pairs, list(METHODS.values()), max_new_tokens=8, repeats=2)


def test_spread() -> None:
    assert spread([3.0], 50, 90) == {"mean": 3, "p50": 3, "p90": 3}
    assert spread([float(i) for i in range(11)], 50, 90) == {"mean": 5, "p50": 5, "p90": 9}


def test_full_is_the_measure_of_all_and_prefix_caching_changes_nothing(
    report: dict[str, Any],
) -> None:
    full, prefix = report["methods"]["full"], report["methods"]["prefix"]
    assert full["kl_first_token"] == {"mean": 0, "p50": 0, "p90": 0}
    assert full["first_token_agreement"] == full["greedy_agreement"] == 1
    assert full["computed_share"] == full["speedup_vs_full"] == 1
    assert max(prefix["kl_first_token"]["mean"], prefix["kl_first_token"]["p90"]) < 1e-8
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
            off = {n for n, m in pair["methods"].items() if m["kl_first_token"] >= 1e-8}
            assert off == {"bfloat16", "q8"}
        else:
            assert computed["placeholders"] < computed["epic"] < computed["prefix"]
            assert computed["placeholders"] <= computed["kvshare"] < computed["prefix"]
            assert pair["methods"]["placeholders"]["kl_first_token"] > 0


def test_summaries_follow_the_pairs(rig: Rig, report: dict[str, Any]) -> None:
    assert len(rig.donors.tree) == 0  # a pair leaves no donor for the next
    pairs = report["per_pair"]
    assert report["pairs"] == len(pairs) == 3
    assert [p["id"] for p in pairs] == ["a", "b", "unlike"]
    tokens = sum(p["tokens"] for p in pairs)
    for name, summary in report["methods"].items():
        rows = [p["methods"][name] for p in pairs]
        assert summary["computed_share"] == sum(r["computed_tokens"] for r in rows) / tokens
        assert summary["kl_first_token"] == spread([r["kl_first_token"] for r in rows], 50, 90)
        assert summary["ttft_s"]["median"] == sorted(r["ttft_s"] for r in rows)[1]
        assert 0 < summary["ttft_s"]["median"] <= summary["ttft_s"]["p90"]
        assert summary["first_token_agreement"] == sum(r["first_token_same"] for r in rows) / 3
        assert summary["declined"] == sum(r["declined"] is not None for r in rows)
        assert summary["rouge_l"] is summary["bleu"] is None  # no references were given


def test_answers_are_compared_with_references(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    [pair] = run(rig, pairs[:1], pick("full"), max_new_tokens=4)["per_pair"]
    assert "rouge_l" not in pair["methods"]["full"]
    ids = rig.loaded.tokenizer(pairs[0]["target"])["input_ids"]
    assert len(ids) < pair["tokens"]  # asked through the chat template
    given = [{**pairs[0], "reference": "the number of the fox"}, pairs[1]]
    summary = run(rig, given, pick("full"), max_new_tokens=4)["methods"]["full"]
    assert 0 <= summary["rouge_l"] <= 1
    assert 0 <= summary["bleu"] <= 100


def test_pairs_that_do_not_fit_are_skipped_with_a_reason(
    rig: Rig, pairs: list[dict[str, Any]]
) -> None:
    long = {"id": "long", "donor": "fox", "target": "a b " * 300}
    odd = {"id": "odd", "donor": 5, "target": "fox"}
    report = run(rig, [long, pairs[0], odd], pick("prefix"), max_new_tokens=4)
    assert [s["id"] for s in report["skipped"]] == ["long", "odd"]
    assert "508 tokens" in report["skipped"][0]["reason"]
    assert set(report["methods"]) == {"full", "prefix"}  # full is always measured
    with pytest.raises(ConfigError, match="no pair could be served"):
        run(rig, [long], pick("prefix"))


def test_the_machine_is_described() -> None:
    told = machine()
    assert told["cores"] >= 1
    assert told["memory_gib"] > 0
    assert told["torch"] == torch.__version__
    assert told["cpu"]


def test_work_is_what_the_model_ran(report: dict[str, Any]) -> None:
    methods = report["methods"]
    assert methods["full"]["work_share"] == 1
    for name in ("prefix", "placeholders", "epic"):  # these measure nothing
        assert methods[name]["work_share"] == pytest.approx(methods[name]["computed_share"])
    # A pass over the first layers of three.
    assert methods["cacheblend"]["work_share"] > methods["cacheblend"]["computed_share"]


def test_layers_of_reused_kv(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    found = run(rig, pairs[:2], pick("prefix,placeholders"), max_new_tokens=2, repeats=1,
                layers=True)["methods"]  # fmt: skip
    assert found["full"]["kv_deviation"] is found["prefix"]["kv_deviation"] is None
    reused = found["placeholders"]["kv_deviation"]
    assert len(reused["key"]) == len(reused["value"]) == 3
    # The first layer's V sees one token only; deeper ones have seen the donor's context.
    assert reused["value"][0] < 1e-5 < reused["value"][1]


def test_known_pairs_are_not_measured_again(
    rig: Rig, pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "repeats": 1}
    path = tmp_path / "r.json.partial"
    first = run(rig, pairs[:1], pick("prefix"), journal=Journal(path, "s"), **options)
    again = run(rig, pairs[:2], pick("prefix"), journal=Journal(path, "s"), **options)
    assert again["per_pair"][0] == first["per_pair"][0]  # times included
    assert again["pairs"] == 2


def test_every_method_needs_a_slot(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    many = [pick(f"repair=window:{width}")[0] for width in range(1, rig.num_slots + 1)]
    with pytest.raises(ValueError, match="slots"):
        run(rig, pairs, many)
