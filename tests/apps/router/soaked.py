"""Do replicas grow? ``python -m tests.apps.router.soaked``: ten minutes, figures at the end.

Two replicas, Redis, Milvus and a router, with so little room that donors are evicted everywhere:
RAM, disk, Redis and what the router remembers. Clients ask, and every fourth goes away in the
middle of its answer. ``KVSHARE_SECONDS`` and ``KVSHARE_CLIENTS`` change how long and how many.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from pathlib import Path

import psutil

from ..server.soak import settled, soak
from .cluster import Cluster, cluster

_SECONDS = float(os.environ.get("KVSHARE_SECONDS", "600"))
_CLIENTS = int(os.environ.get("KVSHARE_CLIENTS", "6"))
_SAMPLES = 20
_SMALL = ("--host-gib", "0.1", "--disk-gib", "0.1", "--shared-ttl-s", "60")
_PATIENT = ("--shared-deadline-ms", "1000")  # the machine is busy


def used(running: Cluster) -> dict[str, tuple[int, int, int]]:
    """MiB resident, open files and sockets, and threads, of each process and its children."""
    parts = {"redis": running.redis, "milvus": running.milvus, "router": running.router}
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


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="kvshare-soaked-"))
    with cluster(
        folder, 2, *_SMALL, *_PATIENT, model="smollm2", router_options=("--remembered", "200")
    ) as running:
        running.redis.client.config_set("maxmemory", 100 << 20)
        running.redis.client.config_set("maxmemory-policy", "allkeys-lru")
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_SECONDS / _SAMPLES):
                print(used(running), flush=True)

        watching = threading.Thread(target=watch)
        watching.start()
        tally = asyncio.run(soak(running.router.url, _CLIENTS, _SECONDS))
        done.set()
        watching.join()
        print(tally)
        for each in running.replicas:
            print("slots are free:", asyncio.run(settled(each.url)), each.events())
        print("evicted by Redis:", running.redis.client.info("stats")["evicted_keys"])
        print("at rest:", used(running))


if __name__ == "__main__":
    main()
