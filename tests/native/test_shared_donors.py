"""Replicas with a shared store and a Milvus between them: one uses what another has computed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm import KVShare, RequestOptions, RequestOutput
from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.reuse import publish, shared
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.reuse.shared import SharedDonors
from kvshare_mm.store.remote_redis import RedisStore
from kvshare_mm.store.shared import RECORD, SharedTier

from ..helpers import until
from ..remote_servers import (
    RedisServer,
    SharedServer,
    be_patient,
    free_port,
    milvus_server,
    shared_server,
)
from .asking import _DONOR, _TARGET, Gate, Inbox, inside, params

OpenReplica = Callable[..., KVShare]
_UNSTORED = RequestOptions(store=False)


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with milvus_server(tmp_path_factory.mktemp("milvus")) as uri:
        yield uri


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[SharedServer]:
    with shared_server(getattr(request, "param", "redis")) as found:
        yield found


each_store = pytest.mark.parametrize("server", ["redis", "mooncake"], indirect=True)


@pytest.fixture
def replica(tiny_folder: Path, milvus: str, server: SharedServer) -> Iterator[OpenReplica]:
    """Opens replicas that are as patient as a busy test machine needs."""
    torch.set_num_threads(1)
    opened: list[KVShare] = []

    def make(**options: Any) -> KVShare:
        usual = {"embedder": None, "shared_store": server.url, "index_uri": milvus}
        patient = {"shared_deadline_ms": 20_000}
        opened.append(KVShare(str(tiny_folder), **(usual | patient | options)))
        donors = inside(opened[-1]).donors
        if donors is not None and donors.shared is not None:
            donors.shared._tokens_per_s = 1.0  # as if computing took for ever
            donors.shared.computed = lambda *_: None
            if "index_uri" not in options:  # there is a server
                be_patient(donors.shared)
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def events(llm: KVShare) -> dict[str, int]:
    counts: dict[str, int] = llm.stats()["donors"]["events"]
    return counts


def ask(llm: KVShare, prompt: str, **options: Any) -> RequestOutput:
    output = llm.generate(prompt, params(4), RequestOptions(**options))
    assert llm.flush(60)
    assert isinstance(output, RequestOutput)
    return output


def told(output: RequestOutput) -> tuple[object, ...]:
    """Answer and provenance, without ids, which each process draws."""
    p = output.provenance
    spans = [(s.start, s.end, s.kind) for s in p.spans]
    return output.token_ids, p.exact, p.reused, p.recomputed, p.declined, p.fallback, spans


@each_store
def test_a_replica_answers_with_anothers_donor_as_with_its_own(replica: OpenReplica) -> None:
    one, two, alone = replica(), replica(), replica(shared_store=None)
    for llm in (one, alone):
        ask(llm, _DONOR)
    own, others = ask(alone, _TARGET), ask(two, _TARGET)
    assert told(others) == told(own)
    p = others.provenance
    assert p.shared == p.exact + p.reused > 0
    assert own.provenance.shared == 0
    assert p.donors == (inside(one).donors.nodes()[0].node_id,)
    assert events(two)["shared_taken"] == 1
    assert two.stats()["requests"]["prompt_tokens_shared"] == p.shared
    # And the first replica uses what the second made of it.
    third = _TARGET.replace("77", "91 805")
    again = ask(one, third)
    assert again.token_ids == ask(alone, third).token_ids
    assert again.provenance.reused > 0


@each_store
def test_a_stream_over_two_replicas_is_answered_as_by_one(replica: OpenReplica) -> None:
    one, two, alone = replica(), replica(), replica(shared_store=None)
    rng = random.Random(0)
    words = _DONOR.split()
    prompts = []
    for _ in range(12):
        edited = list(words)
        for at in rng.sample(range(12, len(words)), 3):
            edited[at] = str(rng.randrange(100))
        prompts.append(" ".join(edited))
    saved = {"by two": 0, "by one": 0}
    for number, prompt in enumerate(prompts):
        got, want = ask((one, two)[number % 2], prompt), ask(alone, prompt)
        assert got.token_ids == want.token_ids
        saved["by two"] += got.provenance.exact + got.provenance.reused
        saved["by one"] += want.provenance.exact + want.provenance.reused
    assert saved["by two"] >= 0.9 * saved["by one"], saved
    assert events(two)["shared_taken"]


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({"cache_salt": ""}, {"cache_salt": "b"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    ],
)
def test_nothing_crosses_salts_and_dtypes(
    replica: OpenReplica, server: SharedServer, theirs: dict[str, str], mine: dict[str, str]
) -> None:
    one, two = replica(**theirs), replica(**mine)
    ask(one, _DONOR)
    assert len(server.nodes()) == 1
    p = ask(two, _TARGET).provenance
    assert (p.declined, p.shared) == ("no_donor", 0)
    assert not [name for name in events(two) if name.startswith("shared_read")]
    # Not even where the catalogue lies.
    donor = inside(one).donors.nodes()[0].node_id
    inside(two).donors.shared._catalogue.search = lambda *_: [donor]
    p = ask(two, _TARGET + " ", store=False, cache_salt="c").provenance
    assert (p.declined, p.shared) == ("no_donor", 0)
    assert events(two)["shared_read_evicted"] == 1


def test_only_what_a_plan_keeps_is_fetched_and_more_of_it_when_needed(
    replica: OpenReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvshare_mm.store.shared.BLOCK", 4)
    monkeypatch.setattr(shared, "_LEAST_COMPUTED", 1)
    one, two = replica(), replica()
    ask(one, _DONOR)
    words = _DONOR.split()
    first, second = " ".join(words[:30]), " ".join([*words[:20], "other", "words", *words[40:]])
    asked = {"store": False, "repair": "none"}
    assert ask(two, first, **asked).provenance.shared > 0
    donors = inside(two).donors
    [taken] = donors.nodes()
    [whole] = inside(one).donors.nodes()
    assert 0 < taken.num_owned < whole.num_owned
    assert told(ask(two, second, **asked)) == told(ask(one, second, **asked))
    [more] = donors.nodes()
    assert more.node_id == taken.node_id
    assert taken.num_owned < more.num_owned
    assert events(two)["shared_taken"] == 2


def _damage(change: Callable[[bytes], bytes], part: str) -> Callable[[SharedServer], None]:
    def damage(server: SharedServer) -> None:
        [key] = server.nodes()
        server.write(key, part, change(server.parts(key)[part]))

    return damage


@each_store
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_damage(lambda c: c[:-1], "0"), "corrupt"),
        (_damage(lambda c: bytes([c[0] ^ 1]) + c[1:], "0"), "corrupt"),
        (_damage(lambda c: c[:40], "record"), "corrupt"),
        (lambda s: s.drop(s.nodes()[0], "0"), "evicted"),
        (lambda s: s.drop(s.nodes()[0], "0", "record"), "evicted"),
        (lambda s: s.kill(), "shared_down"),
        (lambda s: s.hang(), "shared_down"),
    ],
)
def test_whatever_is_wrong_is_a_miss(
    replica: OpenReplica, server: SharedServer, harm: Callable[[SharedServer], None], reason: str
) -> None:
    one, two = replica(), replica()
    ask(one, _DONOR)
    full = one.generate(_TARGET, params(4), RequestOptions(reuse="off"))
    harm(server)
    if reason == "shared_down":
        be_patient(inside(two).donors.shared, 2.0)  # what hangs is waited for as long as that
    output = two.generate(_TARGET, params(4), _UNSTORED)
    assert output.token_ids == full.token_ids
    assert output.provenance.declined == "no_donor"
    assert events(two)[f"shared_read_{reason}"] == 1
    assert two.stats()["donors"]["nodes"] == 0


@each_store
def test_reuse_resumes_when_the_servers_are_back(
    replica: OpenReplica, server: SharedServer
) -> None:
    one, two = replica(), replica()
    server.kill()
    one.generate(_DONOR, params(4))
    one.flush(60)
    assert events(one)["shared_write_shared_down"] == 1
    server.start()
    for llm in (one, two):
        inside(llm).donors.shared._tier.remote.breaker.down_until = 0.0
    ask(one, _DONOR.replace("48210", "51"))
    assert ask(two, _TARGET).provenance.shared > 0


def test_a_catalogue_that_is_not_there_is_a_miss(replica: OpenReplica) -> None:
    llm = replica(index_uri=f"http://127.0.0.1:{free_port()}")
    llm.generate(_DONOR, params(4))
    llm.flush(60)
    assert llm.generate(_TARGET, params(4)).provenance.reused > 0
    assert events(llm)["shared_catalogue_down"] + events(llm)["shared_write_catalogue_down"] >= 2


def test_a_request_does_not_wait_for_a_catalogue_that_is_slow(replica: OpenReplica) -> None:
    one, two = replica(), replica(shared_deadline_ms=3000)
    ask(one, _DONOR)
    gate = Gate(inside(two).donors.shared._catalogue, "search")
    inbox = Inbox(two, _TARGET, params(4), _UNSTORED)
    gate.wait()
    assert inbox.result().provenance.declined == "no_donor"  # while it is still being asked
    gate.open()
    inside(two).engine._searches.close()
    assert events(two)["shared_late"] == 1
    assert two.stats()["donors"]["nodes"] == 0


@pytest.mark.parametrize(("tokens_per_s", "waits"), [(1e-3, True), (1e9, False)])
def test_who_takes_long_to_compute_waits_longer(
    replica: OpenReplica, tokens_per_s: float, waits: bool
) -> None:
    one, two = replica(), replica(shared_deadline_ms=0.001)
    inside(two).donors.shared._tokens_per_s = tokens_per_s
    ask(one, _DONOR)
    assert (ask(two, _TARGET).provenance.shared > 0) == waits


def test_a_fetch_that_takes_longer_than_computing_is_given_up(replica: OpenReplica) -> None:
    one, two = replica(), replica()
    ask(one, _DONOR)
    inside(two).donors.shared._tokens_per_s = 1e9
    assert ask(two, _TARGET, store=False).provenance.declined == "no_donor"
    inside(two).engine._searches.close()
    assert events(two)["shared_read_too_slow"] == 1
    assert two.stats()["donors"]["nodes"] == 0


def test_what_is_slower_than_computing_is_not_fetched(replica: OpenReplica) -> None:
    one, two = replica(), replica()
    ask(one, _DONOR)
    inside(two).donors.shared._bytes_per_s = 1.0
    assert ask(two, _TARGET).provenance.declined == "no_donor"
    assert events(two)["shared_slower"] == 1
    assert "shared_read_bytes" not in events(two)


def test_a_full_redis_costs_the_sharing_and_nothing_else(
    replica: OpenReplica, server: SharedServer
) -> None:
    one = replica()
    server.client.config_set("maxmemory", 1)
    ask(one, _DONOR)
    assert events(one)["shared_write_shared_full"] == 1
    assert ask(one, _TARGET).provenance.reused > 0


def test_donors_that_redis_evicted_hide_others_once(
    replica: OpenReplica, server: SharedServer
) -> None:
    one, two = replica(), replica()
    ask(one, _DONOR.replace("fox", "dog"))
    kept = server.nodes()
    for number in range(10):  # more than are looked at, and all of them more alike
        ask(one, f"{_TARGET} {number}")
    server.client.delete(*set(server.nodes()) - set(kept))
    assert ask(two, _TARGET, store=False).provenance.shared == 0
    assert events(two)["shared_read_evicted"] == 1
    until(lambda: ask(two, _TARGET, store=False).provenance.shared > 0)


def test_publishing_never_blocks(replica: OpenReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_MAX_QUEUED", 1)
    one = replica()
    gate = Gate(inside(one).donors.shared._tier, "put")
    for number in range(4):
        one.generate(f"{_DONOR} And value {number}?", params(2))
        inside(one).engine.wait_saved()
    gate.wait()
    assert events(one)["shared_write_queue_full"] >= 1
    gate.open()
    assert one.flush(60)


@each_store
def test_a_deleted_donor_is_shared_no_more(replica: OpenReplica, server: SharedServer) -> None:
    one, two = replica(), replica()
    ask(one, _DONOR)
    one.cache.clear()
    assert one.flush(60)
    assert server.nodes() == []
    # Who only took it over takes nothing back.
    ask(one, _DONOR)
    assert ask(two, _TARGET, store=False).provenance.shared > 0
    two.cache.clear()
    assert two.flush(60)
    assert len(server.nodes()) == 1
    one.cache.clear()
    assert one.flush(60)
    assert ask(two, _TARGET).provenance.declined == "no_donor"


def test_an_unknown_rate_is_learned_from_what_is_computed(replica: OpenReplica) -> None:
    donors = inside(replica()).donors
    tier = SharedTier(RedisStore("redis://127.0.0.1:1"), 1.0)
    found = SharedDonors(donors, tier, donors.shared._catalogue)
    before = found._tokens_per_s
    found.computed(10, 1e-9)  # too few to tell
    assert found._tokens_per_s == before
    for _ in range(50):
        found.computed(1000, 0.01)
    assert found._tokens_per_s == pytest.approx(100_000, rel=1e-3)


def test_two_replicas_do_not_share_across_requests_that_are_told_exact(
    replica: OpenReplica,
) -> None:
    one, two, alone = replica(), replica(), replica(shared_store=None)
    for llm in (one, alone):
        ask(llm, _DONOR)
    got, want = (ask(llm, _TARGET, reuse="exact") for llm in (two, alone))
    assert told(got) == told(want)
    assert got.provenance.reused == 0 < got.provenance.exact
    assert replace(got.provenance, spans=()).shared == got.provenance.exact


_TENANTS = st.sampled_from(["", "a", "b"])
_ASKED = st.tuples(st.integers(0, 1), _TENANTS, st.integers(0, 2), st.booleans())


@given(st.lists(_ASKED, min_size=2, max_size=8))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_history_crosses_tenants(
    replicas_of_a_test: tuple[KVShare, KVShare], history: list[tuple[int, str, int, bool]]
) -> None:
    """Whatever two replicas were asked by whom: KV comes from donors of the same tenant."""
    owners: dict[str, str] = {}
    for llm in replicas_of_a_test:
        llm.cache.clear()
        llm.flush(60)
    for number, salt, patient, store in history:
        llm = replicas_of_a_test[number]
        prompt = _DONOR.replace("48210", str(patient))
        output = ask(llm, prompt, cache_salt=salt, store=store)
        for replica_ in replicas_of_a_test:
            for node in inside(replica_).donors.nodes():
                owners.setdefault(node.node_id, salt)
                assert node.namespace == namespace(node.namespace[:32], owners[node.node_id])
        assert {owners[donor] for donor in output.provenance.donors} <= {salt}


@pytest.fixture
def replicas_of_a_test(replica: OpenReplica) -> tuple[KVShare, KVShare]:
    return replica(), replica()


@each_store
def test_a_store_killed_while_requests_are_answered(
    replica: OpenReplica, server: SharedServer
) -> None:
    """Again and again, in the middle: all are answered, and rightly."""
    one, two, alone = replica(), replica(), replica(reuse="off", shared_store=None)
    for number in range(20 if isinstance(server, RedisServer) else 4):  # it starts slowly
        for llm in (one, two):  # as if it had been left alone for long enough
            inside(llm).donors.shared._tier.remote.breaker.down_until = 0.0
        ask(one, f"{number}. {_DONOR}")
        prompt = f"{number}. {_DONOR} And value {number}?"
        inbox = Inbox(two, prompt, params(4), RequestOptions(reuse="exact"))
        server.kill()
        want = alone.generate(prompt, params(4))
        assert inbox.result().token_ids == want.token_ids
        server.start()
    two.flush(60)
    assert two.stats()["requests"].get("failed", 0) == 0


def test_a_donor_deleted_while_another_borrows_from_it_is_shared_no_more(
    replica: OpenReplica, server: SharedServer
) -> None:
    one = replica()
    ask(one, _DONOR)
    donors = inside(one).donors
    [owner] = (node.node_id for node in donors.nodes())
    deleting = Gate(donors.store, "delete", lambda node_id: node_id == owner)
    thread = threading.Thread(target=one.cache.delete, args=(owner,))
    thread.start()
    deleting.wait()
    ask(one, _TARGET)  # it borrows, and both are published
    deleting.open()
    thread.join(60)
    assert one.flush(60)
    assert not any(owner.encode() in key for key in server.nodes())


def test_a_deleted_donor_does_not_come_back_while_it_is_still_to_be_withdrawn(
    replica: OpenReplica, server: SharedServer
) -> None:
    one, two = replica(), replica()
    ask(one, _DONOR)
    donors = inside(one).donors
    [owner] = (node.node_id for node in donors.nodes())
    assert ask(two, _TARGET).provenance.shared > 0  # it borrows, and is found by the first
    writing = Gate(donors.shared._publisher, "_write")
    one.cache.delete(owner)
    use = one.generate(_TARGET.replace("77", "78"), params(4), RequestOptions()).provenance
    assert owner not in donors.tree and donors.store.resident(owner) is None
    assert use.shared < 100, "no more than what the other computed"
    writing.open()
    assert one.flush(60)
    assert not any(owner.encode() in key for key in server.nodes())
    assert not donors.shared._publisher.withdrawn


def test_a_donor_that_had_to_go_comes_back_from_the_shared_store(
    replica: OpenReplica, server: SharedServer
) -> None:
    """And is this replica's still: who deletes it there, deletes it for all."""
    one = replica()
    ask(one, _DONOR)
    donors = inside(one).donors
    [owner] = (node.node_id for node in donors.nodes())
    donors.store.reserve(1 << 40)  # no room for anything
    donors.store.reserve(0)
    assert owner not in donors.tree
    use = ask(one, _TARGET, store=False).provenance
    assert use.shared == use.exact + use.reused > 100
    assert owner in donors.tree and events(one)["shared_taken"] == 1
    one.cache.delete(owner)
    assert one.flush(60)
    assert not server.nodes()


def test_a_donor_of_another_that_had_to_go_stays_the_others(
    replica: OpenReplica, server: SharedServer
) -> None:
    one, two = replica(), replica()
    ask(one, _DONOR)
    [owner] = (node.node_id for node in inside(one).donors.nodes())
    donors = inside(two).donors
    for _ in range(2):
        assert ask(two, _TARGET, store=False).provenance.shared > 0
        donors.store.reserve(1 << 40)
        donors.forget(owner)  # as if there had been no room for it from the start
        donors.store.reserve(0)
    assert ask(two, _TARGET, store=False).provenance.shared > 0
    two.cache.delete(owner)
    assert two.flush(60)
    assert len(server.nodes()) == 1


def test_an_owner_of_which_a_part_was_written_comes_with_the_next_that_borrows(
    replica: OpenReplica, server: SharedServer
) -> None:
    one, two = replica(), replica()
    remote = inside(one).donors.shared._tier.remote
    put = remote.put

    def fail(key: str, part: str, content: bytes, ttl_s: float) -> None:
        if part == RECORD:
            raise KVUnavailableError("shared_down", "just now")
        put(key, part, content, ttl_s)

    remote.put = fail
    ask(one, _DONOR)
    remote.put = put
    ask(one, _TARGET.replace("77", "100"))
    use = ask(two, _TARGET, store=False).provenance
    assert use.shared > 100


def test_what_is_taken_over_is_not_on_this_replicas_disk(
    replica: OpenReplica, tmp_path: Path
) -> None:
    """After a restart it would be taken for its own, and be withdrawn from all with it."""
    one, two = replica(), replica(store_dir=tmp_path)
    ask(one, _DONOR)
    assert ask(two, _TARGET).provenance.shared > 0
    [owner] = (node.node_id for node in inside(one).donors.nodes())
    two.close()
    again = replica(store_dir=tmp_path)
    assert owner not in inside(again).donors.tree
    assert ask(again, _TARGET.replace("77", "4"), store=False).provenance.shared > 0


@pytest.mark.parametrize("room", ["deleted", "evicted"])
def test_an_owner_that_is_taken_over_again_narrower_is_no_error(
    replica: OpenReplica, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    monkeypatch.setattr("kvshare_mm.store.shared.BLOCK", 4)
    monkeypatch.setattr(shared, "_LEAST_COMPUTED", 1)
    one, two = replica(), replica(audit_share=0.0)
    ask(one, _DONOR)
    ask(two, _TARGET, repair="none")
    [owner] = (node.node_id for node in inside(one).donors.nodes())
    if room == "deleted":
        two.cache.delete(owner)
    else:
        inside(two).donors.store.delete(owner)
    short = " ".join(_DONOR.split()[:30])
    ask(two, f"{short} and quite another end of this, with a question?", repair="none")
    for _ in range(2):
        use = ask(two, f"{_TARGET} again?", repair="none", store=False).provenance
        assert use.fallback is None and use.reused > 100
