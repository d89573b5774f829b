"""Prefill with donors, end to end on a tiny model: served right, told right, never another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm.donors import DonorPool, namespace
from kvshare_mm.editor import KVEditor
from kvshare_mm.engine.prefill import Prefiller, PrefillResult, provenance
from kvshare_mm.engine.runner import PlainRunner, SlotRunner
from kvshare_mm.outputs import Provenance
from kvshare_mm.plan import Decline, PlannerOptions
from kvshare_mm.repair import RepairPolicy, make_policy
from kvshare_mm.rotary import rerotate
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.stream import text_stream

MAX_LEN = 128
ATOL = 1e-4
NS = namespace("tiny", "")
OTHER_NS = namespace("tiny", "another tenant")
OPTIONS = PlannerOptions(min_run=4, min_gain_tokens=8, min_gain_share=0.2)
NO_REPAIR = make_policy("none")


def _ids(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, n)


def _edited(ids: np.ndarray, *positions: int) -> np.ndarray:
    out = ids.copy()
    out[list(positions)] = (out[list(positions)] + 1) % 128
    return out


class Server:
    """A prefiller over donors, as the engine drives it: prefill, then capture."""

    def __init__(
        self, tiny: Any, disk: DiskTier | None = None, host_bytes: int = 1 << 26, chunk: int = 4096
    ) -> None:
        self.tiny = tiny
        self.runner = SlotRunner(tiny.loaded, 2, MAX_LEN, chunk)
        self.pool = DonorPool("tiny", HostTier(host_bytes), disk)
        self.served: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.namespaces: dict[str, str] = {}
        self.prefiller = Prefiller(
            self.runner, self.pool, KVEditor(tiny.loaded.rotary), OPTIONS, NO_REPAIR
        )

    def prefill(self, ids: np.ndarray, ns: str = NS, **options: Any) -> PrefillResult:
        """Prefill in a slot full of NaN, and check all that must hold whatever was reused."""
        k, v = self.runner.slot_kv(1)
        k.fill_(float("nan"))
        v.fill_(float("nan"))
        result = self.prefiller.prefill(1, text_stream(ids), ns, **options)
        n, plan = len(ids), result.plan
        assert plan.num_tokens == n
        assert k[:, :, n:].isnan().all() and v[:, :, n:].isnan().all()
        assert not k[:, :, :n].isnan().any() and not v[:, :, :n].isnan().any()
        assert not result.logits.isnan().any()
        full = self.tiny.full(ids)
        exact = plan.num_exact
        assert torch.allclose(k[:, :, :exact], full.k[:, :, :exact], atol=ATOL)
        assert torch.allclose(v[:, :, :exact], full.v[:, :, :exact], atol=ATOL)
        if plan.num_exact + len(plan.compute) == n and not plan.approximate.any():
            assert torch.allclose(result.logits, full.logits[-1], atol=ATOL)
            assert torch.allclose(k[:, :, :n], full.k, atol=ATOL)
        kept = plan.kept
        kept[plan.repair] = False
        for run in plan.runs:
            assert self.namespaces.get(run.donor, ns) == ns
            at = run.start + np.flatnonzero(kept[run.start : run.end])
            if run.donor not in self.served:
                continue
            # Bit for bit what the donor was served with, and its keys turned to the new place.
            donor_k, donor_v = self.served[run.donor]
            shift = torch.full((len(at),), run.shift)
            moved = rerotate(donor_k[:, :, at - run.shift], shift, self.tiny.loaded.rotary)
            assert torch.allclose(k[:, :, at], moved, atol=ATOL)
            assert torch.equal(v[:, :, at], donor_v[:, :, at - run.shift])
        _assert_adds_up(result, provenance(result))
        return result

    def capture(self, ids: np.ndarray, result: PrefillResult, ns: str = NS) -> str | None:
        k, v = self.runner.slot_kv(1)
        node_id = self.pool.capture(ids.astype(np.uint64), ns, result.plan, k, v, "")
        if node_id is not None:
            n = len(ids)
            self.served[node_id] = k[:, :, :n].clone(), v[:, :, :n].clone()
            self.namespaces[node_id] = ns
        return node_id

    def serve(self, ids: np.ndarray, ns: str = NS, **options: Any) -> tuple[PrefillResult, str]:
        result = self.prefill(ids, ns, **options)
        node_id = self.capture(ids, result, ns)
        assert node_id is not None
        return result, node_id

    def assert_full(self, ids: np.ndarray, result: PrefillResult) -> None:
        assert result.plan.num_computed == len(ids)
        assert torch.allclose(result.logits, self.tiny.full(ids).logits[-1], atol=ATOL)


def _assert_adds_up(result: PrefillResult, told: Provenance) -> None:
    plan = result.plan
    n = plan.num_tokens
    assert told.exact + told.reused + told.recomputed == n
    assert (told.exact, told.reused) == (plan.num_exact, plan.num_reused)
    assert told.recomputed == len(plan.compute) >= 1
    assert [s.start for s in told.spans] == [0, *(s.end for s in told.spans[:-1])]
    assert told.spans[-1].end == n
    lengths = {"exact": 0, "reused": 0, "recomputed": 0}
    for span in told.spans:
        assert span.start < span.end
        assert (span.donor is None) == (span.kind == "recomputed")
        assert span.donor is None or span.donor in told.donors
        lengths[span.kind] += span.end - span.start
    assert lengths == {
        "exact": told.exact,
        "reused": told.reused,
        "recomputed": told.recomputed,
    }
    computed = [p for s in told.spans if s.kind == "recomputed" for p in range(s.start, s.end)]
    assert computed == plan.compute.tolist()
    for a, b in zip(told.spans[:-1], told.spans[1:], strict=True):
        assert (a.kind, a.donor) != (b.kind, b.donor), "spans are maximal"
    assert 0.0 <= told.similarity <= 1.0
    assert told.fallback == result.fallback


@pytest.fixture
def server(tiny_llama: Any) -> Iterator[Server]:
    server = Server(tiny_llama)
    yield server
    server.pool.close()


# -- what is reused -------------------------------------------------------------------------


def test_the_first_request_is_computed_and_becomes_a_donor(server: Server) -> None:
    ids = _ids(60, 0)
    result, node_id = server.serve(ids)
    server.assert_full(ids, result)
    assert result.plan.declined == Decline.NO_DONOR
    assert result.fallback is None
    assert server.pool.counters["captured"] == 1
    node = server.pool.tree[node_id]
    assert node.num_owned == 60 and node.exact_len == 60
    stored = server.pool.read(node_id, NS)
    assert torch.equal(stored.kv.k, server.served[node_id][0])
    assert torch.equal(stored.kv.v, server.served[node_id][1])


def test_a_similar_request_is_served_from_it(server: Server) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    target = np.concatenate((ids[:20], _ids(3, 9), ids[22:]))  # one token more: 38 move by one
    result, _ = server.serve(target)
    told = provenance(result)
    assert (told.exact, told.reused, told.recomputed) == (20, 37, 4)
    assert told.donors == (donor,)
    assert told.declined is None and told.fallback is None
    assert [(s.start, s.end, s.kind) for s in told.spans] == [
        (0, 20, "exact"),
        (20, 23, "recomputed"),
        (23, 60, "reused"),
        (60, 61, "recomputed"),
    ]
    assert told.similarity == pytest.approx(57 / 61)


def test_repairs_are_computed_and_told(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result = server.prefill(_edited(ids, 20, 40), policy=make_policy("window:5"))
    assert result.plan.repair.tolist() == [*range(21, 26), *range(41, 46)]
    assert provenance(result).recomputed == 13


def test_repairing_everything_gives_the_full_prefill(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 20, 40)
    result = server.prefill(target, policy=make_policy("window:100"))
    assert result.plan.declined == Decline.DIVERGENCE
    assert (result.plan.num_exact, result.plan.num_computed) == (20, 40)
    assert torch.allclose(result.logits, server.tiny.full(target).logits[-1], atol=ATOL)


def test_the_first_edit_of_an_early_token_is_exact_again_behind_it(server: Server) -> None:
    """With position 0 changed nothing is an exact prefix, and nothing says that it is."""
    ids = _ids(60, 0)
    server.serve(ids)
    told = provenance(server.prefill(_edited(ids, 0)))
    assert told.exact == 0 and told.reused == 58


def test_deviation_repairs_the_positions_that_drifted_most(server: Server) -> None:
    ids = _ids(80, 0)
    server.serve(ids)
    target = _edited(ids, 10, 11, 12, 50)
    plan = server.prefill(target).plan
    approximate = np.flatnonzero(plan.approximate)
    drift = np.zeros(80, np.float32)
    new, old = server.tiny.full(target).v[1], server.tiny.full(ids).v[1]
    drift[approximate] = (new - old).pow(2).sum((0, 2)).sqrt().numpy()[approximate]
    repaired = server.prefill(target, policy=make_policy("deviation:0.25")).plan.repair
    count = int(np.ceil(0.25 * len(approximate)))
    want = set(np.argsort(-drift)[:count].tolist())
    assert want <= set(repaired.tolist())
    # The rest is the tail of the prompt, which that policy always takes.
    assert set(repaired.tolist()) - want <= set(range(72, 80))


@pytest.mark.parametrize(
    "spec", ["none", "window:3", "tail:9", "deviation:0.3", "auto:0.5", "auto:2"]
)
def test_every_policy_fills_the_slot(server: Server, spec: str) -> None:
    ids = _ids(70, 0)
    server.serve(ids)
    target = np.concatenate((_ids(3, 5), ids[:30], _ids(4, 6), ids[33:]))
    result = server.prefill(target, policy=make_policy(spec))
    assert result.plan.num_reused > 0


@pytest.mark.parametrize(("spec", "reads"), [("auto:0", 0), ("none", 1), ("deviation:0.2", 1)])
def test_donors_are_read_once_and_not_for_a_plan_that_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, spec: str, reads: int
) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    edit, calls = server.prefiller._editor.edit, []
    monkeypatch.setattr(server.prefiller._editor, "edit", lambda *a: (calls.append(a), edit(*a))[1])
    target = np.concatenate((_ids(3, 5), ids))
    result = server.prefill(target, policy=make_policy(spec))
    assert len(calls) == reads
    assert (result.plan.num_reused > 0) == (reads > 0)


def test_default_policy_is_used_unless_the_request_has_one(tiny_llama: Any) -> None:
    class Recorded:
        calls = 0

        def positions(self, plan: Any, probe: Any) -> np.ndarray:
            Recorded.calls += 1
            return np.empty(0, np.int64)

    server = Server(tiny_llama)
    policy: RepairPolicy = Recorded()
    server.prefiller = Prefiller(
        server.runner, server.pool, KVEditor(tiny_llama.loaded.rotary), OPTIONS, policy
    )
    ids = _ids(60, 0)
    server.serve(ids)
    assert Recorded.calls == 0  # nothing was reused
    server.prefill(_edited(ids, 30))
    assert Recorded.calls == 1
    server.prefill(_edited(ids, 30), policy=NO_REPAIR)
    assert Recorded.calls == 1


def test_chunked_prefill_with_reuse(tiny_llama: Any) -> None:
    ids = _ids(100, 0)
    target = np.concatenate((ids[:10], _ids(30, 3), ids[20:]))
    logits = []
    for chunk in (7, 4096):
        server = Server(tiny_llama, chunk=chunk)
        server.serve(ids)
        result = server.prefill(target, policy=make_policy("window:4"))
        assert result.plan.num_reused > 40
        logits.append(result.logits)
    assert torch.allclose(*logits, atol=ATOL)


# -- exact is exact -------------------------------------------------------------------------


def test_repeat_of_an_exact_request_computes_one_position(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result = server.prefill(ids)
    assert result.plan.num_exact == 59
    assert result.plan.compute.tolist() == [59]
    assert torch.allclose(result.logits, server.tiny.full(ids).logits[-1], atol=ATOL)


def test_repeat_of_an_approximate_request_gets_the_same_answer(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 3, 30)
    first, _ = server.serve(target)
    assert first.plan.num_reused > 0
    again = server.prefill(target)
    assert again.plan.compute.tolist() == [59]
    assert again.plan.num_exact == 4  # what was approximate is not called exact now
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


@pytest.mark.parametrize("cut", [0, 10])
def test_capture_of_a_known_request_adds_nothing(server: Server, cut: int) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    before = server.pool.store.bytes_by_tier()
    known = ids[: len(ids) - cut]
    assert server.capture(known, server.prefill(known)) is None
    assert len(server.pool.tree) == 1
    assert server.pool.counters["capture_known"] == 1
    assert server.pool.store.bytes_by_tier() == before


def test_a_known_request_of_another_tenant_is_not_known(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result, _ = server.serve(ids, OTHER_NS)
    server.assert_full(ids, result)
    assert len(server.pool.tree) == 2


def test_an_approximate_repeat_is_replaced_once_it_was_computed(server: Server) -> None:
    """The twin of a request must hold it exactly, or the better copy would be thrown away."""
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 3, 30)
    server.serve(target)
    exact = server.prefill(target, sharing="off")
    assert server.capture(target, exact) is not None
    assert server.prefill(target).plan.num_exact == 59


def test_answers_become_prefix_of_the_next_turn(server: Server) -> None:
    ids = _ids(50, 0)
    result = server.prefill(ids)
    tokens = [int(result.logits.argmax())]
    for _ in range(9):
        logits = server.runner.decode([1], [tokens[-1]], [49 + len(tokens)])
        tokens.append(int(logits[0].argmax()))
    turn = np.concatenate((ids, tokens[:-1]))
    assert server.capture(turn, result) is not None
    longer = np.concatenate((ids, tokens, _ids(10, 4)))
    assert server.prefill(longer).plan.num_exact == 59


def test_the_answer_of_an_approximate_request_is_not_exact(server: Server) -> None:
    ids = _ids(50, 0)
    server.serve(ids)
    target = _edited(ids, 10)
    result = server.prefill(target)
    tokens = [int(result.logits.argmax())]
    for _ in range(9):
        logits = server.runner.decode([1], [tokens[-1]], [49 + len(tokens)])
        tokens.append(int(logits[0].argmax()))
    turn = np.concatenate((target, tokens[:-1]))
    node_id = server.capture(turn, result)
    assert node_id is not None and server.pool.tree[node_id].exact_len == 11
    longer = np.concatenate((target, tokens, _ids(10, 4)))
    plan = server.prefill(longer).plan
    assert plan.num_exact == 11 and plan.num_reused == 48


def test_approximate_positions_are_no_material_for_others(server: Server) -> None:
    """B computed `own` behind approximate KV; C has only that in common with anybody."""
    a, own = _ids(60, 0), _ids(24, 8)
    server.serve(a)
    result, b = server.serve(np.concatenate((_ids(4, 7), a[:30], own)))
    assert result.plan.num_reused == 30
    c = np.concatenate((_ids(5, 20), own, _ids(4, 21)))
    plan = server.prefill(c).plan
    assert plan.num_computed == len(c), plan
    # Nor under its own id, brought in from outside.
    assert server.prefill(c, similar=(b,)).plan.num_computed == len(c)


def test_borrowed_exact_positions_are_material(server: Server) -> None:
    """What B borrowed from A is as good for C as A's own: it is A's own."""
    a = _ids(60, 0)
    _, node_a = server.serve(a)
    b = _edited(a, 10)
    server.serve(b)
    plan = server.prefill(_edited(b, 0, 40)).plan
    assert plan.num_reused > 40
    pieces = server.pool.pieces(plan)
    assert sum(p.length for p in pieces if p.owner != node_a) == 1  # B's own token, exact too


# -- sharing --------------------------------------------------------------------------------


def test_sharing_off(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result = server.prefill(ids, sharing="off")
    server.assert_full(ids, result)
    assert provenance(result).declined == "sharing_off"


def test_sharing_exact_takes_the_prefix_only(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 30)
    result = server.prefill(target, sharing="exact")
    assert (result.plan.num_exact, result.plan.num_reused) == (30, 0)
    assert result.plan.declined == Decline.EXACT_ONLY
    assert torch.allclose(result.logits, server.tiny.full(target).logits[-1], atol=ATOL)


def test_sharing_exact_takes_nothing_from_an_approximate_donor(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 3, 30)
    server.serve(target)  # stored, exact only up to the first edit
    for asked in (target, np.concatenate((target, _ids(10, 3)))):
        result = server.prefill(asked, sharing="exact")
        assert (result.plan.num_exact, result.plan.num_reused) == (4, 0)
        assert torch.allclose(result.logits, server.tiny.full(asked).logits[-1], atol=ATOL)


def test_sharing_exact_is_not_asked_for_similar_ones(server: Server) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    target = np.concatenate((_ids(5, 3), ids))
    result = server.prefill(target, sharing="exact", similar=(donor,))
    server.assert_full(target, result)


def test_without_donors_or_with_a_plain_runner(tiny_llama: Any) -> None:
    ids = _ids(30, 0)
    editor = KVEditor(None)
    alone = Prefiller(SlotRunner(tiny_llama.loaded, 1, 64, 64), None, editor, OPTIONS, NO_REPAIR)
    result = alone.prefill(0, text_stream(ids), NS)
    assert result.plan.declined == Decline.SHARING_OFF
    assert torch.allclose(result.logits, tiny_llama.full(ids).logits[-1], atol=ATOL)

    class Reference:
        model, device = tiny_llama.reference, torch.device("cpu")

    runner = PlainRunner(Reference(), 1)  # type: ignore[arg-type]
    plain = Prefiller(runner, None, editor, OPTIONS, NO_REPAIR)
    result = plain.prefill(0, text_stream(ids), NS)
    assert result.plan.declined == Decline.UNSUPPORTED_MODEL
    assert torch.allclose(result.logits, tiny_llama.full(ids).logits[-1], atol=ATOL)
    _assert_adds_up(result, provenance(result))


# -- namespaces -----------------------------------------------------------------------------


def test_namespaces_differ_by_model_and_salt() -> None:
    names = {namespace(f, s) for f in ("a", "b", "a-b") for s in ("", "x", "b-x")}
    assert len(names) == 9


@pytest.mark.parametrize("sharing", ["on", "exact"])
def test_the_same_tokens_under_another_salt(server: Server, sharing: str) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    for asked in (ids, _edited(ids, 30), ids[:40]):
        result = server.prefill(asked, OTHER_NS, sharing=sharing)
        server.assert_full(asked, result)
        assert provenance(result).donors == ()


def test_an_id_of_another_namespace_gives_nothing(server: Server) -> None:
    ids = _ids(60, 0)
    _, theirs = server.serve(ids)
    mine = _ids(60, 1)
    server.serve(mine, OTHER_NS)
    for asked in (ids, _edited(ids, 30), np.concatenate((mine[:20], ids))):
        result = server.prefill(asked, OTHER_NS, similar=(theirs, "made up", theirs))
        assert theirs not in result.plan.donors
        assert result.fallback is None, "not even planned with"
        assert result.plan.num_reused + result.plan.num_exact <= 20


def test_the_namespace_is_checked_again_when_kv_is_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a search that is all wrong does not mix namespaces."""
    ids = _ids(60, 0)
    _, theirs = server.serve(ids)
    find = server.pool.find
    monkeypatch.setattr(server.pool, "find", lambda keys, ns, *rest: find(keys, NS, *rest))
    result = server.prefiller.prefill(1, text_stream(ids), OTHER_NS)
    assert result.fallback == "wrong_namespace"
    server.assert_full(ids, result)
    assert server.pool.store.counters["read_wrong_namespace"] == 1
    assert theirs in server.pool.tree  # it did nothing wrong


# -- a cache failure is a miss --------------------------------------------------------------


def _evict(server: Server, node_id: str) -> None:
    """Take a node's KV away behind everybody's back."""
    server.pool.store._host.delete(node_id)


def test_an_evicted_donor_is_a_fallback(server: Server) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    _evict(server, donor)
    target = _edited(ids, 30)
    result = server.prefill(target)
    assert result.fallback == "evicted"
    server.assert_full(target, result)
    told = provenance(result)
    assert (told.exact, told.reused, told.donors) == (0, 0, ())
    assert server.pool.store.counters["read_evicted"] == 1
    # Nobody looks for it again.
    again = server.prefill(target)
    assert again.fallback is None and again.plan.declined == Decline.NO_DONOR
    assert server.pool.counters["forgotten"] == 1


def test_one_evicted_donor_of_two_leaves_no_trace_of_the_other(server: Server) -> None:
    a, b = _ids(50, 0), _ids(50, 1)
    _, node_a = server.serve(a)
    _, node_b = server.serve(b)
    target = np.concatenate((_ids(3, 2), a[:40], b[5:45], _ids(2, 3)))
    assert set(server.prefill(target).plan.donors) == {node_a, node_b}
    _evict(server, node_b)
    result = server.prefill(target)
    assert result.fallback is None
    assert server.pool.store.counters["read_evicted"] == 1
    without = server.prefill(target)
    assert result.plan.donors == without.plan.donors == (node_a,)
    assert np.array_equal(result.plan.compute, without.plan.compute)
    torch.testing.assert_close(result.logits, without.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_donor_on_disk_is_a_fallback(
    tiny_llama: Any, tmp_path: Path, damage: str
) -> None:
    # RAM that holds nothing: every read comes from disk.
    server = Server(tiny_llama, DiskTier(tmp_path, 1 << 30), host_bytes=0)
    ids = _ids(60, 0)
    server.serve(ids)
    assert server.pool.flush(10)
    target = _edited(ids, 30)
    assert server.prefill(target).plan.num_reused > 0
    (path,) = tmp_path.glob("*.kvnode")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1000])
    else:
        path.unlink()
    result = server.prefill(target)
    assert result.fallback == ("evicted" if damage == "remove" else "corrupt")
    server.assert_full(target, result)
    again = server.prefill(target)
    assert again.fallback is None and again.plan.declined == Decline.NO_DONOR
    server.pool.close()


def test_a_donor_dropped_after_it_was_planned(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    find = server.pool.find

    def find_and_lose(*args: Any) -> Any:
        found = find(*args)
        server.pool.delete(donor)
        return found

    monkeypatch.setattr(server.pool, "find", find_and_lose)
    target = _edited(ids, 30)
    result = server.prefill(target)
    assert result.fallback == "evicted"
    server.assert_full(target, result)


def test_a_lookup_that_fails_is_a_miss(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = _ids(60, 0)
    server.serve(ids)

    def fail(*_: Any) -> Any:
        raise RuntimeError("index on fire")

    monkeypatch.setattr(server.pool.catalogue._lexical, "search", fail)
    result = server.prefill(_edited(ids, 30))
    server.assert_full(_edited(ids, 30), result)
    assert result.fallback == "lookup_error"
    assert server.pool.counters["lookup_error"] == 1


def test_an_edit_that_fails_otherwise_is_a_miss(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say, a shared store that holds another version of the node than the tree knows."""
    ids = _ids(60, 0)
    server.serve(ids)

    def fail(*_: Any) -> Any:
        raise ValueError("does not own")

    monkeypatch.setattr(server.prefiller._editor, "edit", fail)
    target = _edited(ids, 30)
    result = server.prefill(target)
    assert result.fallback == "edit_error"
    server.assert_full(target, result)


# -- dropped owners -------------------------------------------------------------------------


def test_children_of_a_dropped_owner_keep_what_they_own(server: Server) -> None:
    a = _ids(60, 0)
    _, node_a = server.serve(a)
    b = _edited(a, 0, 30)
    _, node_b = server.serve(b)
    server.pool.delete(node_a)
    assert node_b in server.pool.tree
    for asked in (b, _edited(b, 50), a):
        result = server.prefill(asked)
        assert result.plan.num_reused + result.plan.num_exact <= 2, result.plan
        if not result.plan.num_reused:
            assert torch.allclose(result.logits, server.tiny.full(asked).logits[-1], atol=ATOL)


def test_what_was_repaired_is_owned(server: Server) -> None:
    """A repaired position is stored as computed, not as the donor's KV that was not trusted."""
    a = _ids(60, 0)
    server.serve(a)
    b = _edited(a, 20)
    first, node_b = server.serve(b, policy=make_policy("window:6"))
    assert len(first.plan.repair) == 6
    assert server.pool.tree[node_b].num_owned == 8  # the edit, the repairs, the last position
    again = server.prefill(b)
    assert again.plan.compute.tolist() == [59]
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


def test_a_donor_dropped_before_the_capture(server: Server) -> None:
    """The slot holds all KV by then: the new node owns what it can no longer borrow."""
    a = _ids(60, 0)
    _, node_a = server.serve(a)
    b = _edited(a, 30)
    result = server.prefill(b)
    assert result.plan.num_reused > 0
    server.pool.delete(node_a)
    node_b = server.capture(b, result)
    assert node_b is not None
    assert server.pool.tree[node_b].num_owned == 60
    assert server.pool.tree[node_b].exact_len == 31
    again = server.prefill(b)
    assert again.plan.compute.tolist() == [59]
    assert torch.allclose(again.logits, result.logits, atol=ATOL)


def test_a_new_node_that_pushes_its_own_owner_out(tiny_llama: Any) -> None:
    a = _ids(60, 0)
    probe = Server(tiny_llama)
    _, node_a = probe.serve(a)
    size = probe.pool.store.bytes_by_tier()["host"]
    server = Server(tiny_llama, host_bytes=int(size * 1.2))
    _, node_a = server.serve(a)
    b = np.concatenate((a[:30], _ids(40, 5)))
    _, node_b = server.serve(b)
    assert node_a not in server.pool.tree
    assert node_b in server.pool.tree
    # Where A was there is a hole; behind it B has what it computed itself.
    result = server.prefill(b)
    assert (result.plan.num_exact, result.plan.num_reused) == (0, 39)
    server.assert_full(b, server.prefill(b, sharing="exact"))


def test_a_request_too_large_for_the_store(tiny_llama: Any) -> None:
    server = Server(tiny_llama, host_bytes=1000)
    ids = _ids(60, 0)
    assert server.capture(ids, server.prefill(ids)) is None
    assert server.pool.counters["capture_too_large"] == 1
    assert len(server.pool.tree) == 0
    assert server.prefill(ids).plan.declined == Decline.NO_DONOR


def test_short_requests_are_not_stored(server: Server) -> None:
    ids = _ids(15, 0)
    assert server.capture(ids, server.prefill(ids)) is None
    assert len(server.pool.tree) == 0


# -- restart --------------------------------------------------------------------------------


def test_donors_survive_a_restart(tiny_llama: Any, tmp_path: Path) -> None:
    first = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    a = _ids(60, 0)
    b = _edited(a, 20)
    _, node_a = first.serve(a)
    _, node_b = first.serve(b)
    _, theirs = first.serve(_ids(60, 1), OTHER_NS)
    asked = [a, b, _edited(a, 40), _edited(b, 5, 50), np.concatenate((b, _ids(9, 2)))]
    before = [first.prefill(ids) for ids in asked]
    first.pool.close()

    second = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    second.served, second.namespaces = first.served, first.namespaces
    assert {n.node_id for n in second.pool.tree} == {node_a, node_b, theirs}
    assert second.pool.counters["restored"] == 3
    for ids, was in zip(asked, before, strict=True):
        now = second.prefill(ids)
        assert now.fallback is None
        assert now.plan.num_exact == was.plan.num_exact
        assert now.plan.num_reused == was.plan.num_reused > 0 or was.plan.num_reused == 0
        assert torch.allclose(now.logits, was.logits, atol=ATOL)
    result = second.prefill(_ids(60, 1))
    second.assert_full(_ids(60, 1), result)
    assert second.prefill(_ids(60, 1), OTHER_NS).plan.donors == (theirs,)
    second.pool.close()


def test_nodes_of_another_model_are_left_alone(tiny_llama: Any, tmp_path: Path) -> None:
    first = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    a = _ids(60, 0)
    first.serve(a, namespace("another model", ""))
    first.serve(a)
    first.pool.close()
    second = Server(tiny_llama, DiskTier(tmp_path, 1 << 30))
    assert len(second.pool.tree) == 1
    assert len(list(tmp_path.glob("*.kvnode"))) == 2
    second.pool.close()


# -- any history ----------------------------------------------------------------------------


def _variant(draw: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
    """A random edit: tokens replaced, put in, left out, blocks moved, ends cut."""
    kind = draw(st.sampled_from(["replace", "insert", "delete", "move", "cut", "grow", "same"]))
    at = draw(st.integers(0, len(ids) - 1))
    n = draw(st.integers(1, 8))
    fresh = _ids(n, draw(st.integers(100, 110)))
    if kind == "replace":
        ids = np.concatenate((ids[:at], fresh, ids[at + n :]))
    elif kind == "insert":
        ids = np.concatenate((ids[:at], fresh, ids[at:]))
    elif kind == "delete":
        ids = np.concatenate((ids[:at], ids[at + n :]))
    elif kind == "move":
        ids = np.concatenate((ids[at:], ids[:at]))
    elif kind == "cut":
        ids = ids[: max(20, at)]
    elif kind == "grow":
        ids = np.concatenate((ids, fresh))
    return ids[:MAX_LEN] if len(ids) >= 20 else _ids(20, 99)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_history_of_requests(tiny_llama: Any, data: st.DataObject) -> None:
    """Requests that are edits of one another, in two namespaces, with donors lost on the way.

    `Server.prefill` checks every answer against full prefills and against what donors held.
    """
    server = Server(tiny_llama, chunk=data.draw(st.sampled_from([16, 4096])))
    seen = [_ids(40, 0), _ids(55, 1)]
    for _ in range(data.draw(st.integers(3, 9))):
        ids = _variant(data.draw, seen[data.draw(st.integers(0, len(seen) - 1))])
        seen.append(ids)
        ns = data.draw(st.sampled_from([NS, NS, NS, OTHER_NS]))
        sharing = data.draw(st.sampled_from(["on", "on", "on", "exact", "off"]))
        spec = data.draw(st.sampled_from(["none", "window:2", "deviation:0.2", "auto"]))
        known = tuple(server.served)
        result = server.prefill(
            ids, ns, sharing=sharing, policy=make_policy(spec), similar=known[-2:]
        )
        if sharing == "exact":
            assert torch.allclose(result.logits, tiny_llama.full(ids).logits[-1], atol=ATOL)
        if data.draw(st.booleans()):
            server.capture(ids, result, ns)
        if known and data.draw(st.integers(0, 3)) == 0:
            lost = data.draw(st.sampled_from(known))
            if data.draw(st.booleans()):
                server.pool.delete(lost)
            else:
                _evict(server, lost)
    server.pool.close()
