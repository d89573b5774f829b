"""Hit rates of streams whose answers are known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.hitrate import run, template_length, user_span
from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.pools import PlannedPool, ServedPool
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.repair import make_policy
from kvshare_mm.stream import SegmentStream, text_stream

_OPTIONS = PlannerOptions()


def stream(*parts: range) -> SegmentStream:
    return text_stream([token for part in parts for token in part])


def pool(size: int, repair: str = "none", **options: Any) -> PlannedPool:
    return PlannedPool(size, _OPTIONS, make_policy(repair), **options)


def prefix_pool(size: int) -> PlannedPool:
    return PlannedPool(size, _OPTIONS.but_exact_only(), make_policy("none"), whole=True)


def whole(streams: list[SegmentStream]) -> list[tuple[int, int]]:
    return [(0, len(s)) for s in streams]


def test_shares_by_hand() -> None:
    # Of 100 tokens the first 40 are another prompt's too; 60 are, but behind another beginning.
    streams = [
        stream(range(100)),
        stream(range(40), range(1000, 1060)),
        stream(range(2000, 2040), range(40, 100)),
        stream(range(3000, 3100)),
    ]
    report = run(streams, whole(streams), {"prefix": prefix_pool, "kvshare": pool}, [10], 3)
    json.dumps(report, allow_nan=False)
    found = report["pool_sizes"]["10"]["methods"]
    assert found["prefix"]["shares"] == [0.4, 0, 0]
    # The last position of a prompt is always computed.
    assert found["kvshare"]["shares"] == [0.4, 0.59, 0]
    assert found["prefix"]["token_share"] == pytest.approx(40 / 300)
    assert found["kvshare"]["token_share"] == pytest.approx(99 / 300)
    assert found["kvshare"]["prompt_share"] == pytest.approx(0.33)
    assert set(found["kvshare"]["planner_ms"]) == {"mean", "p50", "p99"}
    assert report["pool_sizes"]["10"]["donors"] == 2
    assert report["pool_sizes"]["10"]["gptcache_hit_rate"] is None


def test_a_small_pool_forgets() -> None:
    again = stream(range(100))
    streams = [again, stream(range(500, 600)), stream(range(700, 800)), again]
    report = run(streams, whole(streams), {"prefix": prefix_pool}, [1, 2, 3], 1)
    shares = [s["methods"]["prefix"]["shares"] for s in report["pool_sizes"].values()]
    assert shares == [[0], [0], [0.99]]
    assert [s["donors"] for s in report["pool_sizes"].values()] == [1, 2, 3]


def test_the_template_counts_for_nothing() -> None:
    def chat(*words: range) -> SegmentStream:
        return stream(range(9000, 9030), *words, range(9100, 9105))

    head, tail = template_length(chat(range(3)), chat(range(7, 8)))
    assert (head, tail) == (30, 5)
    streams = [chat(range(50)), chat(range(100, 150)), chat(range(10), range(200, 240))]
    spans = [user_span(s, head, tail) for s in streams]
    assert spans[0] == (30, 80)
    report = run(streams, spans, {"prefix": prefix_pool}, [5], 2)
    assert report["pool_sizes"]["5"]["methods"]["prefix"]["shares"] == [0, 0.2]


def test_a_user_who_says_what_the_template_says() -> None:
    assert user_span(stream(range(8)), 5, 3) == (5, 6)
    assert user_span(stream(range(6)), 5, 3) == (5, 6)


def test_gptcache_hits() -> None:
    streams = [stream(range(k, k + 20)) for k in (0, 100, 200, 300)]
    vectors = np.array([[1, 0], [0, 1], [0.8, 0.6], [-1, 0]], dtype=np.float32)
    found = run(streams, whole(streams), {"prefix": prefix_pool}, [1, 3], 3, vectors)["pool_sizes"]
    # Cosines to the nearest of all before: 0, 0.8, 0; to the one before alone: 0, 0.6, -0.8.
    assert found["3"]["gptcache_hit_rate"] == pytest.approx(1 / 3)
    vectors[2] = [0.95, 0.3122]
    found = run(streams, whole(streams), {"prefix": prefix_pool}, [1], 3, vectors)["pool_sizes"]
    assert found["1"]["gptcache_hit_rate"] == 0


def test_repairs_count_as_computed() -> None:
    first, second = stream(range(100)), stream(range(500, 520), range(20, 100))
    plain, repaired = pool(5), pool(5, "window:8")
    for each in (plain, repaired):
        each.admit(first)
    without, with_repairs = plain.admit(second)[0], repaired.admit(second)[0]
    assert with_repairs.num_computed == without.num_computed + 8


def test_served_prompts_are_planned_as_without_a_model(rig: Rig) -> None:
    ids = np.random.default_rng(0).integers(3, 300, 120)
    changed = ids.copy()
    changed[30:34] = [5, 6, 7, 8]
    streams = [text_stream(ids), text_stream(changed)]
    planned, served = pool(3), ServedPool(rig, 3, METHODS["placeholders"])
    for one in streams:
        plan, seconds = served.admit(one)
        assert plan.runs == () or seconds > 0
        expected = planned.admit(one)[0]
        assert plan.num_computed == expected.num_computed
    assert plan.num_reused > 80
    assert len(served) == len(planned) == 2
    served.close()
    assert len(rig.donors.tree) == 0


@pytest.mark.parametrize("measured", [0, 4, 5])
def test_some_prompts_must_come_before(measured: int) -> None:
    streams = [stream(range(20))] * 4
    with pytest.raises(ConfigError, match="come before"):
        run(streams, whole(streams), {"prefix": prefix_pool}, [5], measured)
