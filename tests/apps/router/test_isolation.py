"""Through a router and replicas that share Redis and Milvus, tenants stay strangers.

They send the same texts in any order. Nobody's request is served from what only others have sent,
nobody's decides where another's goes, and no reply or page holds what another one has said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm import KVShare
from kvshare_mm.apps.server.keys import add_key

from ...remote_servers import milvus_server, redis_server
from ..server.conftest import Running, start
from .conftest import Route, Routed

_SECRETS = {"shop-a": "Quillfeather", "shop-b": "Brannigoss", "shop-c": "Ostravine"}
_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))
_STEPS = st.tuples(
    st.sampled_from([*_SECRETS]), st.booleans(), st.integers(0, 2), st.sampled_from(["", "same"])
)


class Shops:
    """A router, its replicas, and a key for each tenant."""

    def __init__(self, routed: Routed, replicas: list[Running], keys: dict[str, str]) -> None:
        self.routed, self.replicas, self.keys = routed, replicas, keys
        self.counts: Counter[str] = Counter()
        self.said: dict[str, list[str]] = {name: [] for name in _SECRETS}
        self.made: dict[tuple[str, str], set[str]] = {}

    def ask(self, who: str, secret: bool, patient: int, salt: str) -> None:
        """One request, and what it may be served from."""
        text = f"{_SECRETS[who] if secret else ''} Report of patient {patient}. {_ROWS} Is it fine?"
        known = self.made.setdefault((who, salt), set())
        donor = self._sent_to_a_donor()
        reply = self.routed.chat(
            text,
            self.keys[who],
            max_tokens=3,
            temperature=0,
            cache_salt=salt or None,
            kvshare={"max_divergence": 1e6},
        )
        assert reply.status_code == 200, reply.text
        self.said[who].append(f"{reply.text} {dict(reply.headers)}")
        use: dict[str, Any] = reply.json()["kvshare"]
        assert {*use["donors"]} <= known
        if not known:
            assert use["exact"] == use["reused"] == 0
            assert self._sent_to_a_donor() == donor
        for replica in self.replicas:
            assert replica.llm.flush(60)
        every = set().union(*self.made.values())
        known |= self.stored() - every
        self.counts["tokens reused"] += use["exact"] + use["reused"]
        self.counts["tokens of other replicas"] += use["shared"]

    def _sent_to_a_donor(self) -> float:
        page = self.routed.ask("GET", "/metrics").text.splitlines()
        begin = "kvshare_router_requests_total{"
        found = [line for line in page if line.startswith(begin) and 'reason="donor"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def stored(self) -> set[str]:
        found = set()
        for replica in self.replicas:
            found |= {donor.donor_id for donor in replica.llm.cache.list()}
        return found


@pytest.fixture(scope="module")
def replicas(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Running], dict[str, str]]]:
    folder = tmp_path_factory.mktemp("shops")
    keys = {name: add_key(folder / "keys", name) for name in _SECRETS}
    with redis_server() as redis, milvus_server(folder / "milvus") as milvus:

        def load() -> KVShare:
            llm = KVShare(
                str(tiny_folder),
                embedder=None,
                shared_store=redis.url,
                index_uri=milvus,
                shared_deadline_ms=20_000,
            )
            parts: Any = llm._parts
            parts.donors.shared._tokens_per_s = 1.0  # as if computing took for ever
            parts.donors.shared.computed = lambda *_: None
            parts.engine._searches._help_s = 20.0  # however late its thread has its turn
            return llm

        options = {"keys_file": folder / "keys", "scope": "tenant", "admin_key": None}
        running = [start(load, **options) for _ in range(2)]
        for each in running:
            each.wait_ready()
        yield running, keys
        for each in running:
            each.stop()


@given(st.lists(_STEPS, min_size=3, max_size=10))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_is_served_from_what_only_others_sent(
    replicas: tuple[list[Running], dict[str, str]], route: Route, history: list[Any]
) -> None:
    shops = _shops(replicas, route)
    for who, secret, patient, salt in history:
        shops.ask(who, secret, patient, salt)
    _check(shops)


def test_tenants_use_what_is_their_own(
    replicas: tuple[list[Running], dict[str, str]], route: Route
) -> None:
    """Else the test above would prove nothing."""
    shops = _shops(replicas, route)
    for patient in range(3):
        for who in _SECRETS:
            shops.ask(who, True, patient, "")
    for number, replica in enumerate(replicas[0]):  # past the router: what the other one made
        shops.routed = Routed(replica.url, [])
        for who in _SECRETS:
            shops.ask(who, True, 3 + number, "")
    assert shops.counts["tokens reused"] and shops.counts["tokens of other replicas"]
    _check(shops)


def _shops(replicas: tuple[list[Running], dict[str, str]], route: Route) -> Shops:
    """Everything is forgotten, and the router is a new one."""
    running, keys = replicas
    for each in running:
        each.llm.cache.clear()
        assert each.llm.flush(60)
    return Shops(route([each.url for each in running]), running, keys)


def _check(shops: Shops) -> None:
    for who, replies in shops.said.items():
        others = set().union(*(made for (name, _), made in shops.made.items() if name != who))
        names = {name for name in _SECRETS if name != who}
        secrets = {secret for name, secret in _SECRETS.items() if name != who}
        said = "\n".join(replies)
        assert not [word for word in (*others, *names, *secrets) if word in said]
    for url in (shops.routed.url, *(replica.url for replica in shops.replicas)):
        page = Routed(url, []).ask("GET", "/metrics").text
        everything = (*_SECRETS, *_SECRETS.values(), *shops.keys.values(), *shops.stored())
        assert not [word for word in everything if word in page]
