"""Simulated routing: by hand, by queueing theory, and beside the router's own choice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.router.plan import Standing, choose
from kvshare_mm.apps.router.simulation import POLICIES, Donors, Requests, pick, simulate
from kvshare_mm.apps.simulate import drawn, timed, traced
from kvshare_mm.errors import ConfigError

from ..conftest import Run


def requests(at: list[float], family: list[int], shared: int = 8) -> Requests:
    n = len(at)
    key = np.array(family)
    return Requests(np.array(at), np.full(n, 10), key, np.full(n, shared), key, key)


@pytest.mark.parametrize(
    ("family", "cache", "waits", "work"),
    [
        # Computed are 10, 10, then 2 behind the first's half second, and 10 behind the second's.
        ([0, 0, 0, 1], 100, [0, 0, 0.5, 0.5], [10 + 2, 10 + 10]),
        ([0, 0, 0, 1], 9, [0, 0, 0.5, 0.5], [20, 20]),
        ([0, 1, 0, 1], 10, [0, 0, 0.5, 0.5], [12, 12]),
    ],
)
def test_two_replicas_by_hand(
    family: list[int], cache: int, waits: list[float], work: list[int]
) -> None:
    found = simulate(requests([0, 0, 0.5, 0.5], family), "round robin", 2, 10, cache)
    assert found["wait_mean_s"] == pytest.approx(sum(waits) / 4)
    assert found["ttft_mean_s"] == pytest.approx(sum(waits) / 4 + sum(work) / 10 / 4)
    assert found["computed"] == pytest.approx(sum(work) / 40)
    assert found["busiest"] == pytest.approx(max(work) * 2 / sum(work))


def test_families_used_longest_ago_go_first() -> None:
    donors = Donors(20)
    asked = [(0, 10), (1, 10), (0, 10), (2, 10), (1, 10), (2, 10), (2, 25), (2, 5)]
    assert [donors.replace(*each) for each in asked] == [0, 0, 10, 0, 0, 10, 10, 0]


def test_the_last_position_is_always_computed() -> None:
    found = simulate(requests([0, 0], [0, 0], shared=10), "round robin", 1, 10, 100)
    assert found["computed"] == pytest.approx(11 / 20)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_one_replica_without_reuse_is_a_queue_of_theory(load: float) -> None:
    """M/D/1: the mean wait is rho / (2 (1 - rho)) times the time that each takes."""
    rng = np.random.default_rng(1)
    made = drawn(400_000, 10, 5, 1.0, np.array([0.0]), 0.5, 7, rng)
    found = simulate(timed(made, load), "round robin", 1, 10, 100)
    assert found["wait_mean_s"] == pytest.approx(load / (2 * (1 - load)), rel=0.03)


_STANDINGS = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda n: st.lists(st.tuples(st.integers(0, 16), st.integers(0, 64)), min_size=n, max_size=n)
)


@given(_STANDINGS, st.sampled_from([16, 1024]), st.integers(0, 9))
def test_it_chooses_as_the_router_does(
    standings: list[tuple[int, int]], length: int, seed: int
) -> None:
    replicas = [
        Standing(i, share / 16, ahead * 32.0, ahead * 32.0)
        for i, (share, ahead) in enumerate(standings)
    ]
    shared = np.array([length * r.share for r in replicas])
    ahead = np.array([r.ahead for r in replicas])
    found = pick(length, shared, ahead, random.Random(seed))
    assert found == choose(length, replicas, random.Random(seed)).replica


def test_what_begins_alike_goes_to_one_place_unless_that_has_too_much_to_do() -> None:
    alike = requests([0.0] * 40, [0] * 40)
    by_prefix, two, kvshare = (
        simulate(alike, policy, 4, 10, 1e9) for policy in ("by prefix", "two choices", "kvshare")
    )
    assert by_prefix["busiest"] == 4
    assert by_prefix["computed"] == pytest.approx((10 + 39 * 2) / 400)
    assert two["busiest"] < 4 and kvshare["busiest"] < 2
    assert kvshare["ttft_p99_s"] < two["ttft_p99_s"] < by_prefix["ttft_p99_s"]


def test_a_trace(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"timestamp": 0, "input_length": 1000, "hash_ids": [0, 1]},
        {"timestamp": 5000, "input_length": 1500, "hash_ids": [0, 1, 2]},
        {"timestamp": 2000, "input_length": 900, "hash_ids": [0, 7]},
        {"timestamp": 9000, "input_length": 900, "hash_ids": [0, 7]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = traced(path, 3)
    assert found.at.tolist() == [0, 2, 5]
    assert found.family.tolist() == found.user.tolist() == [0, 1, 0]
    assert found.shared.tolist() == [0, 450, 1000]
    assert timed(found, 2.0).at.tolist() == pytest.approx([0, 0.6, 1.5])


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no requests"), ("{}", "line 1"), ('{"timestamp": 0}', "line 1"), ("[", "line 1"),
     ("[" * 9999, "line 1: Invalid JSON: [^0-9]*$"), ("[1]", "line 1: .* object"),
     ('{"timestamp": 0, "input_length": 5, "hash_ids": []}', "line 1")],
)  # fmt: skip
def test_another_file_is_no_trace(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError, match=said):
        traced(tmp_path / "trace", 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("timestamp", value) for value in ("NaN", "-Infinity", "1e400", "1e300", '"0"', "null")),
        *(("input_length", value) for value in ("1e400", "1e30", "-5", "NaN", "9" * 20, "0.5")),
        *(("hash_ids", value) for value in ("[NaN]", "[[1]]", '"ab"', "{}")),
    ],
)
def test_a_line_of_a_trace_that_makes_no_sense_is_named(
    run: Run, tmp_path: Path, field: str, value: str
) -> None:
    good = {"timestamp": "0", "input_length": "5", "hash_ids": "[1]"}
    rows = [good, {**good, field: value}]
    lines = ["{" + ", ".join(f'"{name}": {v}' for name, v in row.items()) + "}" for row in rows]
    (path := tmp_path / "trace").write_text("\n".join(lines))
    done = run("simulate", "--trace", path)
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: trace: {path}, line 2: {field}")
    assert done.output.count("\n") == 1


def test_a_trace_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"\xff\xfe\n")
    for path, said in ((tmp_path / "trace", ", line 1"), (tmp_path, ": Is a directory")):
        done = run("simulate", "--trace", path)
        assert done.exit_code == 1 and f"{path}{said}" in done.output


def test_a_trace_whose_requests_come_all_at_once(run: Run, tmp_path: Path) -> None:
    line = '{"timestamp": %s, "input_length": 5, "hash_ids": ["a", 1]}\n'
    (path := tmp_path / "trace").write_text(line % "0" + line % "1e-320")
    done = run("simulate", "--trace", path, "--json")
    assert done.exit_code == 0, done.output
    assert all(row["ttft_p50_s"] > 0 for row in json.loads(done.output)["policies"].values())


def test_the_largest_numbers_give_numbers(run: Run) -> None:
    asked = ("--prompt-tokens", "--bytes-per-token", "--tokens-per-second", "--cache-gib")
    most = [word for name in asked for word in (name, 10**9)]
    for load, zipf in ((1e-3, 10), (1e6, 0)):
        done = run("simulate", "--requests", 50, *most, "--load", load, "--zipf", zipf, "--json")
        assert done.exit_code == 0, done.output
        for row in json.loads(done.output)["policies"].values():
            assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"] < 1e12
            assert 0 < row["computed"] <= 1 <= row["busiest"]


def test_more_than_memory_holds_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: Any) -> Requests:
        raise MemoryError

    monkeypatch.setattr("kvshare_mm.apps.simulate.drawn", drawn)
    done = run("simulate", "--requests", 10**9)
    assert done.exit_code == 1 and done.output.startswith("Error: requests")


def test_the_command(run: Run, tmp_path: Path) -> None:
    asked = ("simulate", "--requests", 3000, "--replicas", 4, "--families", 200)
    done = run(*asked, "--share", 0.5, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["requests_per_s"] == pytest.approx(0.7 * 4 * 10_000 / 2000)
    computed = {name: row["computed"] for name, row in found["policies"].items()}
    assert computed.keys() == POLICIES.keys()
    assert 0.5 < computed["kvshare"] < computed["by prefix"] < computed["round robin"] < 1
    # What was measured stands for the share.
    curve = tmp_path / "curve.json"
    pools = {
        str(size): {
            "methods": {m: {"token_share": 0.3, "shares": s} for m in ("prefix", "kvshare")}
        }
        for size, s in ((10, [0.1]), (20, [0.5, 0.5]))
    }
    curve.write_text(json.dumps({"pool_sizes": pools}))
    same = json.loads(run(*asked, "--similarity", curve, "--json").output)
    assert same["policies"]["by prefix"]["computed"] == pytest.approx(
        computed["by prefix"], abs=0.02
    )
    assert "round robin" in run(*asked).output
    done = run("simulate", "--families", 10**6, "--replicas", 1000, "--requests", 10**6)
    assert done.exit_code == 1 and "families" in done.output
