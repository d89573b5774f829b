"""Four replicas, Redis, Milvus and a router do what one process does, whatever of it dies.

``KVSHARE_REPLICAS=4 KVSHARE_KILLS=20`` takes more replicas and kills each part more often; figures
are printed (``pytest -s``).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from kvshare_mm.apps.bench.serve import Sample

from ...helpers import until
from ...remote_servers import Server
from .cluster import Cluster, bodies, cluster, plan, sent, shared_tokens
from .measured import families

pytestmark = pytest.mark.e2e

_REPLICAS = int(os.environ.get("KVSHARE_REPLICAS", "2"))
_KILLS = int(os.environ.get("KVSHARE_KILLS", "2"))
_PATIENT = ("--shared-deadline-ms", "1000")  # the machine is busy
_UNSTORED = {"reuse": "off", "store": False}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, _REPLICAS, *_PATIENT, model="smollm2") as found:
        yield found


def test_a_stream_is_answered_as_by_one(running: Cluster) -> None:
    texts = families(6, 5, 80)
    one = sent(bodies(texts, "one"), lambda _: running.replicas[0].url)
    routed = sent(bodies(texts, "routed"), lambda _: running.router.url)
    spread = sent(bodies(texts, "spread"), lambda i: running.replicas[i % _REPLICAS].url)
    for name, samples in (("router", routed), ("round robin", spread)):
        assert not [s.error for s in samples if s.error]
        alike = [(a, b) for a, b in zip(one, samples, strict=True) if plan(a) == plan(b)]
        assert all(a.text == b.text for a, b in alike)
        share = shared_tokens(samples) / shared_tokens(one)
        print(f"\n{name}: {share:.1%} of what one process reuses, {len(alike)} plans are equal,"
              f" {sum(a.text == b.text for a, b in zip(one, samples, strict=True))} answers of"
              f" {len(one)}")  # fmt: skip
        assert share >= 0.9


class Load:
    """Clients that ask a router until told to stop, each answer compared with what is right."""

    def __init__(self, running: Cluster) -> None:
        self.counts: Counter[str] = Counter()
        self._running = running
        self._texts = families(4, 4, 60, seed=3)
        right = sent(bodies(self._texts, "right", **_UNSTORED), self._replica, _REPLICAS)
        assert not [s.error for s in right if s.error]
        self._right = [s.text for s in right]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(4)]

    def _replica(self, i: int) -> str:
        return self._running.replicas[i % _REPLICAS].url

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._stop.is_set():
            at = draw.randrange(len(self._texts))
            # New salts now and then: else all is computed after a while.
            salt = f"{time.monotonic() // 5}"
            asked = bodies([self._texts[at]], salt, reuse=draw.choice(["exact", "similar"]))
            [sample] = sent(asked, lambda _: self._running.router.url)
            self.counts[self._judged(sample, asked[0]["kvshare"]["reuse"], self._right[at])] += 1

    def _judged(self, sample: Sample, reuse: str, right: str) -> str:
        if sample.error:
            return f"{'failed' if sample.ttft is None else 'broke off'}: {sample.error}"
        if reuse == "exact" or not sample.reuse["reused"]:
            return "right" if sample.text == right else "wrong"
        return "similar: the same" if sample.text == right else "similar: another"


def _server(running: Cluster, part: str, number: int) -> Server:
    servers = {"redis": running.redis, "milvus": running.milvus}
    return servers.get(part) or running.replicas[number % _REPLICAS]


@pytest.mark.parametrize("part", ["replica", "redis", "milvus"])
def test_a_part_is_killed_under_load(running: Cluster, part: str) -> None:
    draw = random.Random(part)
    with Load(running) as load:
        for number in range(_KILLS):
            before = load.counts.total()
            until(lambda before=before: load.counts.total() >= before + 4, 120)
            time.sleep(draw.uniform(0, 2))
            victim = _server(running, part, number)
            victim.kill()
            before = load.counts.total()
            until(lambda before=before: load.counts.total() >= before + 4, 120)
            victim.start()
    print(f"\n{part} killed {_KILLS} times: {dict(sorted(load.counts.items()))}")
    for each in running.replicas:
        print(each.events())
    assert not [name for name in load.counts if name.startswith(("failed", "wrong"))]
    if part != "replica":
        assert not [name for name in load.counts if name.startswith("broke off")]
    assert load.counts["right"]
    _reuse_resumes(running)


def _reuse_resumes(running: Cluster) -> None:
    """A replica uses again what another one has just computed, without being told to."""
    count = 0

    def shared() -> bool:
        nonlocal count
        count += 1
        texts = families(1, 2, 60, seed=1000 + count)
        donor, taker = running.replicas[:2]
        [first] = sent(bodies(texts[:1], f"again {count}"), lambda _: donor.url)
        time.sleep(0.5)  # it is published behind the answer
        [second] = sent(bodies(texts[1:], f"again {count}"), lambda _: taker.url)
        assert not first.error and not second.error
        return bool(second.reuse["shared"])

    start = time.monotonic()
    until(shared, 120)
    print(f"others' donors are used again after {time.monotonic() - start:.0f} s")
