"""Replicas, a shared store, Milvus and a router do what one process does, whatever of it dies.

``KVSHARE_REPLICAS=4 KVSHARE_KILLS=20`` takes more replicas and kills each part more often,
``KVSHARE_MODEL=tiny-vl`` a model that takes little room, ``KVSHARE_SHARED=mooncake`` another store
than Redis; figures are printed (``pytest -s``).
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
_KILLS = int(os.environ.get("KVSHARE_KILLS", "1"))
_MODEL = os.environ.get("KVSHARE_MODEL", "smollm2")
_SHARED = os.environ.get("KVSHARE_SHARED", "redis")
_OPTIONS = ("--host-gib", "0.5", "--shared-deadline-ms", "3000")  # the machine is busy
_UNSTORED = {"reuse": "off", "store": False}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, _REPLICAS, *_OPTIONS, model=_MODEL, kind=_SHARED) as found:
        yield found


def test_a_stream_is_answered_as_by_one(running: Cluster) -> None:
    texts = families(2 * _REPLICAS, 4, 80)
    one = sent(bodies(texts, "one"), lambda _: running.replicas[0].url)
    routed = sent(bodies(texts, "routed"), lambda _: running.router.url)
    published = [0]

    def next_replica(i: int) -> str:
        """Whose turn it is, once the catalogue has what the one before has computed."""
        if i:
            until(lambda: _published(running) > published[0], 60)
        published[0] = _published(running)
        return running.replicas[i % _REPLICAS].url

    spread = sent(bodies(texts, "spread"), next_replica)
    # Without the others' donors two replicas would compute each family twice, and reuse two thirds.
    for name, samples, least in (("router", routed, 0.9), ("round robin", spread, 0.8)):
        assert not [s.error for s in samples if s.error]
        alike = [(a, b) for a, b in zip(one, samples, strict=True) if plan(a) == plan(b)]
        assert all(a.text == b.text for a, b in alike)
        share = shared_tokens(samples) / shared_tokens(one)
        print(f"\n{name}: {share:.1%} of what one process reuses, {len(alike)} plans are equal,"
              f" {sum(a.text == b.text for a, b in zip(one, samples, strict=True))} answers of"
              f" {len(one)}")  # fmt: skip
        assert share >= least


@pytest.fixture(scope="module")
def right(running: Cluster) -> dict[str, str]:
    """Prompts and their answers without reuse."""
    texts = families(4, 4, 60, seed=3)
    found = sent(
        bodies(texts, "right", **_UNSTORED),
        lambda i: running.replicas[i % _REPLICAS].url,
        _REPLICAS,
    )
    assert not [s.error for s in found if s.error]
    return dict(zip(texts, (s.text for s in found), strict=True))


class Load:
    """Clients that ask a router until told to stop, each answer compared with what is right.

    Args:
        running: whose router.
        right: prompts and their answers.
    """

    def __init__(self, running: Cluster, right: dict[str, str]) -> None:
        self._outcomes: list[str] = []
        self._running = running
        self._right = right
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(4)]

    @property
    def counts(self) -> Counter[str]:
        """Answers by what became of them."""
        return Counter([*self._outcomes])

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
            text = draw.choice([*self._right])
            # New salts now and then: else everything is known after a while.
            salt = f"{time.monotonic() // 5}"
            asked = bodies([text], salt, reuse=draw.choice(["exact", "similar"]))
            [sample] = sent(asked, lambda _: self._running.router.url)
            reuse = asked[0]["kvshare"]["reuse"]
            self._outcomes.append(self._judged(sample, reuse, self._right[text]))

    def _judged(self, sample: Sample, reuse: str, right: str) -> str:
        if sample.error:
            return f"{'failed' if sample.ttft is None else 'broke off'}: {sample.error}"
        if reuse == "exact" or not sample.reuse["reused"]:
            return "right" if sample.text == right else "wrong"
        return "similar: the same" if sample.text == right else "similar: another"


def _published(running: Cluster) -> int:
    """Rows that the replicas have given to the catalogue."""
    return sum(replica.events().get("shared_published", 0) for replica in running.replicas)


def _server(running: Cluster, part: str, number: int) -> Server:
    servers = {"store": running.shared, "milvus": running.milvus}
    return servers.get(part) or running.replicas[number % _REPLICAS]


@pytest.mark.parametrize("part", ["replica", "store", "milvus"])
def test_a_part_is_killed_under_load(running: Cluster, right: dict[str, str], part: str) -> None:
    draw = random.Random(part)
    with Load(running, right) as load:
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
    bad = ("failed", "wrong") if part == "replica" else ("failed", "wrong", "broke off")
    assert not [name for name in load.counts if name.startswith(bad)]
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
