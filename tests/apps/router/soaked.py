"""Do replicas grow? ``python -m tests.apps.router.soaked``: ten minutes, figures at the end.

Two replicas, Redis, Milvus and a router, with so little room that donors are evicted everywhere:
RAM, disk, Redis and what the router remembers. Clients ask the router, and every fourth goes away
in the middle of its answer. Others ask past it: what one replica has just been asked, another is
asked next, so that it must take over the donor. ``KVSHARE_SECONDS``, ``KVSHARE_CLIENTS`` and
``KVSHARE_MODEL`` change how long, how many, and of what.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from ..server.soak import settled, soak
from .cluster import Cluster, bodies, cluster, sent
from .measured import families

_SECONDS = float(os.environ.get("KVSHARE_SECONDS", "600"))
_CLIENTS = int(os.environ.get("KVSHARE_CLIENTS", "6"))
_MODEL = os.environ.get("KVSHARE_MODEL", "smollm2")
_SAMPLES = 20
_GIB = {"smollm2": 0.1}.get(_MODEL, 0.01)  # a token of tiny-vl takes a tenth
_SMALL = ("--host-gib", str(_GIB), "--disk-gib", str(_GIB), "--shared-ttl-s", "60")
_PATIENT = ("--shared-deadline-ms", "1000")  # the machine is busy


def used(running: Cluster) -> dict[str, tuple[int, int, int]]:
    """MiB resident, open files and sockets, and threads, of each process and its children."""
    parts = {"redis": running.shared, "milvus": running.milvus, "router": running.router}
    parts |= {f"replica {i}": replica for i, replica in enumerate(running.replicas)}
    found = {}
    for name, part in parts.items():
        whole = psutil.Process(part.pid)
        family = [whole, *whole.children(recursive=True)]
        found[name] = (
            sum(p.memory_info().rss for p in family) >> 20,
            sum(p.num_fds() for p in family),
            sum(p.num_threads() for p in family),
        )
    return found


def ask_past_the_router(running: Cluster, done: threading.Event) -> Counter[str]:
    """Ask one replica, then the other what begins so; what became of the second requests."""
    counts: Counter[str] = Counter()
    while not done.is_set():
        number = counts["asked"] = counts["asked"] + 1
        one, other = (running.replicas[(number + i) % 2].url for i in range(2))
        [text] = families(1, 1, 200, seed=number)
        sent(bodies([text], "past"), lambda _, url=one: url)
        time.sleep(1)  # it is published behind the answer
        exact, off = {"reuse": "exact"}, {"reuse": "off", "store": False}
        asked = [bodies([f"{text} And then?"], "past", **ours)[0] for ours in (exact, off)]
        found, right = sent(asked, lambda _, url=other: url)
        if found.error or right.error:
            counts[f"failed: {found.error or right.error}"] += 1
            continue
        counts["right" if found.text == right.text else "wrong"] += 1
        counts["took over a donor"] += found.reuse["shared"] > 0
        counts["tokens taken over"] += found.reuse["shared"]
    return counts


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="kvshare-soaked-"))
    with cluster(
        folder, 2, *_SMALL, *_PATIENT, model=_MODEL, router_options=("--remembered", "200")
    ) as running:
        running.shared.client.config_set("maxmemory", int(_GIB * (1 << 30)))
        running.shared.client.config_set("maxmemory-policy", "allkeys-lru")
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_SECONDS / _SAMPLES):
                print(used(running), [each.events() for each in running.replicas], flush=True)

        def past() -> None:
            print("past the router:", ask_past_the_router(running, done), flush=True)

        # Behind that, `soak` asks again what was not answered as it should be.
        threading.Timer(_SECONDS, done.set).start()
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(watch), pool.submit(past)]
            print(asyncio.run(soak(running.router.url, _CLIENTS, _SECONDS)))
            for other in others:
                other.result()
        for each in running.replicas:
            print("slots are free:", asyncio.run(settled(each.url)), each.events())
        print("evicted by Redis:", running.shared.client.info("stats")["evicted_keys"])
        print("at rest:", used(running))


if __name__ == "__main__":
    main()
