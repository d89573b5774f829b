"""Nothing crosses tenants, models or types of numbers, whatever replicas share and are asked.

Replicas with Redis and Milvus between them, RAM and disk too small for all, are asked the same
texts by several tenants, restarted in between, and told lies by the catalogue. Of every read it is
known in whose world its donor was made: that of a model, a dtype and a salt.

``KVSHARE_EXAMPLES=200`` draws more histories; what happened is printed at the end (``pytest -s``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import MilvusClient
from safetensors.torch import load_file, save_file

from kvshare_mm import KVShare, RequestOptions, SamplingParams
from kvshare_mm.node import Piece
from kvshare_mm.reuse.plan import ReusePlan

from ..remote_servers import RedisServer, be_patient, milvus_server, redis_server

_EXAMPLES = int(os.environ.get("KVSHARE_EXAMPLES", "6"))
_SALTS = ("", "Quillfeather", "Brannigoss")
_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(10))
_TEXT = f"Answer in one line. Laboratory report. Patient {{}}. {_ROWS} Question: what is value 3?"
_SMALL = {"host_bytes": 1 << 20, "disk_bytes": 1 << 20}
_POLICIES: list[dict[str, Any]] = [
    {"reuse": "exact"},
    {"max_divergence": 0.0},
    {"max_divergence": 1e6},
    {"repair": "none"},
]


class World(NamedTuple):
    """Who shares with whom."""

    model: int
    dtype: str
    salt: str


class Step(NamedTuple):
    """What is done to a replica.

    Attributes:
        replica: its number.
        salt: whose request it is.
        patient: what it asks about.
        policy: how it may be served.
        before: what happens to the replica first.
    """

    replica: int
    salt: str
    patient: int
    policy: dict[str, Any]
    before: str


_STEPS = st.builds(
    Step,
    st.sampled_from([0, 0, 1, 1, 2, 3]),
    st.sampled_from(_SALTS),
    st.integers(0, 2),
    st.sampled_from(_POLICIES),
    st.sampled_from(["nothing"] * 6 + ["a lie", "a restart", "clear"]),
)


class Cluster:
    """Replicas: two of a kind, one of another model, one of another dtype; and what they read.

    Attributes:
        born: in whose world a node was made, by its id.
        crossed: reads that crossed, in words.
        counts: what happened.
    """

    KINDS = ((0, "float32"), (0, "float32"), (1, "float32"), (0, "bfloat16"))

    def __init__(self, models: Sequence[Path], redis: RedisServer, milvus: str, folder: Path):
        self.born: dict[str, World] = {}
        self.crossed: list[str] = []
        self.counts: Counter[str] = Counter()
        self.redis, self.milvus = redis, milvus
        self._models, self._folder = models, folder
        self.replicas = [self._opened(number) for number in range(len(self.KINDS))]

    def _opened(self, number: int) -> KVShare:
        model, dtype = self.KINDS[number]
        llm = KVShare(
            str(self._models[model]),
            dtype=dtype,
            embedder=None,
            max_num_seqs=1,
            store_dir=str(self._folder / f"{number}"),
            shared_store=self.redis.url,
            index_uri=self.milvus,
            shared_deadline_ms=20_000,
            min_gain_share=0.1,
            **_SMALL,
        )
        parts: Any = llm._parts
        donors = parts.donors
        donors.shared._tokens_per_s = 1.0  # as if computing took for ever
        donors.shared.computed = lambda *_: None
        be_patient(donors.shared)
        place, likely = donors.worker.place, donors.likely_answer

        def placed(pieces: Sequence[Piece], ns: str, *more: Any) -> Any:
            self._reads({piece.owner for piece in pieces}, "KV")
            return place(pieces, ns, *more)

        def drafted(plan: ReusePlan, target: np.ndarray) -> np.ndarray:
            found: np.ndarray = likely(plan, target)
            if len(found):
                self._reads({str(plan.edited_from)}, "draft")
            return found

        donors.worker.place, donors.likely_answer = placed, drafted
        return llm

    def _reads(self, owners: set[str], what: str) -> None:
        self.counts[f"reads of {what}"] += 1
        wrong = {owner for owner in owners if self.born.get(owner) != self.asking}
        if wrong:
            self.crossed.append(f"{what} of {[self.born.get(o) for o in wrong]}: {self.asking}")

    def close(self) -> None:
        for llm in self.replicas:
            llm.close()

    def emptied(self) -> None:
        """Nothing is stored anywhere; rows are left behind, under a secret that is lost."""
        for llm in self.replicas:
            llm.cache.clear()
            assert llm.flush(60)
        self.redis.client.flushall()
        self.born.clear()

    def run(self, step: Step) -> None:
        model, dtype = self.KINDS[step.replica]
        self.asking = World(model, dtype, step.salt)
        if step.before == "a restart":
            self.replicas[step.replica].close()
            self.replicas[step.replica] = self._opened(step.replica)
        llm = self.replicas[step.replica]
        parts: Any = llm._parts
        if step.before == "clear":
            llm.cache.clear()
        catalogue = parts.donors.shared._catalogue
        search = catalogue.search
        if step.before == "a lie":
            catalogue.search = lambda *_: [*self.born]
        try:
            self._ask(llm, step)
        finally:
            catalogue.search = search
        self.counts[step.before] += 1

    def _ask(self, llm: KVShare, step: Step) -> None:
        prompt = _TEXT.format(step.patient)
        params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
        salted = {"cache_salt": step.salt}
        got = llm.generate(prompt, params, RequestOptions(**salted, **step.policy))
        assert llm.flush(60)
        use = got.provenance
        self.counts["requests"] += 1
        self.counts["tokens of other replicas"] += use.shared
        self.counts["tokens reused"] += use.exact + use.reused
        known = {node_id for node_id, world in self.born.items() if world == self.asking}
        assert {*use.donors} <= known
        if not known:
            assert use.exact == use.reused == 0
        if step.policy in _POLICIES[:2] and self.asking.dtype == "float32":
            alone = RequestOptions(reuse="off", store=False, **salted)
            assert got.token_ids == llm.generate(prompt, params, alone).token_ids
        self._record()

    def _record(self) -> None:
        """Whose what is new is; nobody else's is anywhere."""
        for (model, dtype), llm in zip(self.KINDS, self.replicas, strict=True):
            parts: Any = llm._parts
            for node in parts.donors.nodes():
                world = self.born.setdefault(node.node_id, self.asking)
                assert (world.model, world.dtype) == (model, dtype)

    def check(self) -> None:
        assert not self.crossed
        namespaces: dict[str, World] = {}
        for llm in self.replicas:
            parts: Any = llm._parts
            for node in parts.donors.nodes():
                world = self.born[node.node_id]
                assert namespaces.setdefault(node.namespace, world) == world
            told = json.dumps(llm.stats())
            secret = (*_SALTS[1:], *self.born, *namespaces, "Laboratory")
            assert not [word for word in secret if word in told]
        assert len({*namespaces.values()}) == len(namespaces)
        self._check_redis()
        self._check_catalogue()

    def _check_redis(self) -> None:
        """Under the name of one namespace lie nodes of one world."""
        owners: dict[bytes, World] = {}
        for key in self.redis.nodes():
            *prefix, node_id = key.split(b":")
            world = self.born[node_id.decode()]
            assert owners.setdefault(b":".join(prefix), world) == world
        assert len({*owners.values()}) == len(owners)

    def _check_catalogue(self) -> None:
        """Rows of different worlds have nothing in common, though their texts are the same."""
        client = MilvusClient(uri=self.milvus)
        try:
            [collection] = client.list_collections()
            rows = client.query(
                collection, filter="expires > 0", output_fields=["node_id", "namespace", "sparse"]
            )
        finally:
            client.close()
        names: dict[World, str] = {}
        prints: dict[World, set[int]] = {}
        for row in rows:
            world = self.born.get(row["node_id"])
            if world is not None:
                assert names.setdefault(world, row["namespace"]) == row["namespace"]
                prints.setdefault(world, set()).update(row["sparse"])
        assert len({*names.values()}) == len(names)
        assert sum(map(len, prints.values())) == len(set().union(*prints.values()))
        self.counts["worlds in the catalogue"] += len(prints)


@pytest.fixture(scope="module")
def cluster(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("replicas")
    other = folder / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    moved = {name: weight + 0.01 for name, weight in weights.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    with redis_server() as redis, milvus_server(folder / "milvus") as milvus:
        made = Cluster((tiny_folder, other), redis, milvus, folder)
        yield made
        made.close()
        print("\n" + "\n".join(f"{n:7} {name}" for name, n in sorted(made.counts.items())))


@given(st.lists(_STEPS, min_size=3, max_size=12))
@settings(max_examples=_EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_history_crosses_worlds(cluster: Cluster, history: list[Step]) -> None:
    cluster.emptied()
    for step in history:
        cluster.run(step)
    cluster.check()


def test_what_is_shared_within_a_world_is_used(cluster: Cluster) -> None:
    """Else the test above would prove nothing."""
    cluster.emptied()
    before = cluster.counts.copy()
    for salt in _SALTS:
        for patient in range(3):
            for replica in range(4):
                cluster.run(Step(replica, salt, patient, _POLICIES[patient], "nothing"))
    cluster.check()
    grown = cluster.counts - before
    assert grown["tokens of other replicas"] and grown["reads of KV"] and grown["reads of draft"]
    assert grown["worlds in the catalogue"] == 3 * len(_SALTS)
