"""What is measured of servers, as tables of the report and of Markdown pages."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.bench.readme import filled
from kvshare_mm.apps.bench.serve import Sample, summary
from kvshare_mm.apps.bench.server_overhead import prompts


def serve(concurrency: int) -> dict[str, Any]:
    """As the command writes it, of one request in a hundred that failed."""
    reuse = {"exact": 20, "reused": 30, "recomputed": 150, "declined": None,
             "seconds": {"ttft": 0.1}}  # fmt: skip
    good = Sample(ttft=0.12, reuse=reuse)
    other = Sample(ttft=0.12, reuse={**reuse, "declined": "no_donor"})
    found = summary([good] * 90 + [other] * 9 + [Sample(error="status 429")])
    return {"kind": "serve", "model": "shop", "concurrency": concurrency, **found}


OVERHEAD = {
    "kind": "server-overhead", "model": "smollm2", "tokens": 71, "repeats": 15, "same_answers": 14,
    "ttft_s": {"server": 0.2042, "api": 0.2001},
    "outside_engine_s": {"server": 0.0049, "api": 0.0008},
    "difference_s": {"median": 0.0043, "p90": 0.0091, "all": [0.0043] * 15},
    "command": "kvshare bench server-overhead",
}  # fmt: skip


def row(results: dict[str, dict[str, Any]], *names: str) -> list[str]:
    """Rows of the table that a Markdown page gets, without its headings."""
    text, missing = filled(f"<!-- results: {' '.join(names)} -->\n<!-- /results -->", results)
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    return rows[2:]


def test_loads_stand_below_each_other() -> None:
    rows = row({"one": serve(1), "many": serve(8)}, "one", "many")
    assert rows[0] == (
        "| 1 | 99 of 100 | 19800 | 10% | 15% | 75% | no_donor (9) | 120 ms | 100 ms |"
    )
    assert rows[1].startswith("| 8 | 99 of 100 |")


def test_what_was_not_seen_is_a_dash() -> None:
    refused = {"kind": "serve", "model": "shop", "concurrency": 2,
               **summary([Sample(error="status 429")])}  # fmt: skip
    [told] = row({"refused": refused}, "refused")
    assert told == "| 2 | 0 of 1 | 0 | 0% | 0% | 0% | - | - | - |"


def test_the_servers_cost() -> None:
    assert row({"o": OVERHEAD}, "o") == [
        "| Python API | 71 tokens | 200.1 ms | 0.8 ms | - | - | - |",
        "| server | 71 tokens | 204.2 ms | 4.9 ms | 4.3 ms | 9.1 ms | 14 of 15 |",
    ]


@given(st.integers(1, 30), st.integers(4, 20))
def test_prompts_differ_and_are_as_long(count: int, words: int) -> None:
    made = prompts(count, words, len)
    assert len(set(map(len, made))) == 1
    assert len(set(made)) == len(made) == count
    assert {len(text.split()) for text in made} == {words}
