"""Prefill with pictures and sound: exact where it says so, turned right, encoders run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.native.prefill import Prefiller, PrefillResult, provenance
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.plan import PlannerOptions, ReusePlan
from kvshare_mm.reuse.repair import NoRepair, make_policy
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.store.media import media_id, media_ids
from kvshare_mm.stream import SegmentStream

from ..media_models import FAMILIES
from ..media_oracle import Oracle
from ..modalities.media import RATE, picture, tone

Oracles = Callable[[str], Oracle]
Parts = list[dict[str, Any]]

MAX_LEN = 400
ATOL = 1e-4
NS = namespace("tiny", "")
OTHER_NS = namespace("tiny", "another tenant")
OPTIONS = PlannerOptions(min_run=4, min_gain_tokens=4, min_gain_share=0.0)
NO_REPAIR = make_policy("none")
SIZES = [(112, 84), (56, 56), (28, 140), (168, 56)]


def see(kind: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(*SIZES[kind % len(SIZES)], seed=kind)}


def hear(kind: int = 0) -> dict[str, Any]:
    return {"type": "audio", "audio": (tone(0.3 + 0.17 * kind, 300 + 90 * kind), RATE)}


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> Parts:
    return [{"role": "user", "content": list(parts)}]


def medium(family: str, kind: int = 0) -> dict[str, Any]:
    """A picture for what can see, else a clip."""
    return hear(kind) if family == "qwen2_audio" else see(kind)


class Server:
    """Prefiller, donors and encoder as the engine has them."""

    def __init__(self, oracle: Oracle, disk: DiskTier | None = None, host_bytes: int = 1 << 26):
        self.oracle = oracle
        self.runner = SlotRunner(oracle.loaded, 1, MAX_LEN, 4096)
        self.pool = DonorPool("tiny", KVEditor(oracle.loaded.rotary), HostTier(host_bytes), disk)
        self.encoder = MediaEncoder(oracle.loaded, self.pool.store)
        self.prefiller = Prefiller(
            self.runner,
            self.pool,
            OPTIONS,
            NO_REPAIR,
            self.encoder,
        )

    def prefill(self, stream: SegmentStream, ns: str = NS, **options: Any) -> PrefillResult:
        """Prefill in a slot full of NaN."""
        for tensor in self.runner.slot_kv(0):
            tensor.fill_(float("nan"))
        result = self.prefiller.prefill(0, stream, ns, **options)
        for tensor in self.runner.slot_kv(0):
            assert not tensor[:, :, : len(stream)].isnan().any()
        return result

    def serve(self, messages: Parts, ns: str = NS, **options: Any) -> PrefillResult:
        """Prefill and take up as a donor."""
        stream = self.oracle.stream(messages)
        result = self.prefill(stream, ns, **options)
        self.prefiller.save(0, stream, ns, result)
        return result

    def assert_first_layer(self, messages: Parts) -> None:
        """The first layer's K and V depend on token and position alone: reused or not, they must
        be those of a full prefill, which no wrong turn survives."""
        full = self.oracle.full(self.oracle.inputs(messages))
        n = full.k.shape[2]
        for got, want in zip(self.runner.slot_kv(0), (full.k, full.v), strict=True):
            assert torch.allclose(got[0, :, :n], want[0], atol=ATOL, rtol=0)

    @property
    def runs(self) -> int:
        return self.encoder.counters["tower_runs"]

    @property
    def hits(self) -> int:
        return self.encoder.counters["tower_hits"]


@pytest.fixture
def server(oracles: Oracles) -> Server:
    return Server(oracles("qwen2_5_vl"))


# -- exactness ------------------------------------------------------------------------------------


def prompt_of(family: str, draw: Callable[[Any], Any]) -> Parts:
    """One to six parts, media and text in any order."""
    kinds = {"qwen2_audio": "at", "qwen2_5_omni_thinker": "ait"}.get(family, "it")
    parts = []
    for _ in range(draw(st.integers(1, 6))):
        kind, which = draw(st.sampled_from(kinds)), draw(st.integers(0, 3))
        text = say(["What is it?", " and ", "Order 48213.", "?"][which])
        parts.append({"i": see, "a": hear}[kind](which) if kind != "t" else text)
    return user(*parts)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_positions_over_an_exact_donor(
    oracles: Oracles, family: str, data: st.DataObject
) -> None:
    oracle = oracles(family)
    messages = prompt_of(family, data.draw)
    stream, full = oracle.stream(messages), oracle.full(oracle.inputs(messages))
    n = len(stream)
    share = data.draw(st.sampled_from([0.05, 0.3, 0.8, 1.0]))
    chosen = np.random.default_rng(data.draw(st.integers(0, 999))).random(n) < share
    compute = np.flatnonzero(chosen | (np.arange(n) == n - 1))
    runner = SlotRunner(oracle.loaded, 1, MAX_LEN, data.draw(st.sampled_from([3, 4096])))
    for tensor, source in zip(runner.slot_kv(0), (full.k, full.v), strict=True):
        tensor.fill_(float("nan"))
        tensor[:, :, :n] = source
        tensor[:, :, compute] = float("nan")
    encoder = MediaEncoder(oracle.loaded, None)
    touched = [
        (segment, item)
        for segment, item in zip(stream.media, stream.items, strict=True)
        if ((compute >= segment.start) & (compute < segment.end)).any()
    ]
    features = tuple((s.start, encoder.features(item, NS)[0]) for s, item in touched)
    media = MediaInputs(stream.positions, features)
    logits = runner.prefill(0, stream.token_ids, compute, media=media)
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    for got, want in zip(runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, :n], want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_known_is_a_full_prefill(oracles: Oracles, family: str) -> None:
    server = Server(oracles(family))
    messages = user(say("Look: "), medium(family), say(" What is it?"))
    result = server.serve(messages)
    full = server.oracle.full(server.oracle.inputs(messages))
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)
    assert (server.runs, server.hits) == (1, 0)
    assert [use.source for use in result.media] == ["encoder"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_prefix_with_media(oracles: Oracles, family: str) -> None:
    server = Server(oracles(family))
    server.serve(user(medium(family), say("What is it?")))
    messages = user(medium(family), say("What colour does it have?"))
    result = server.prefill(server.oracle.stream(messages), reuse="exact")
    full = server.oracle.full(server.oracle.inputs(messages))
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)
    n = len(full.logits)
    for got, want in zip(server.runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, :n], want, atol=ATOL, rtol=0)
    [use] = result.media
    assert use.source == "kv"
    assert result.plan.num_exact > use.end
    assert (server.runs, server.hits) == (1, 0)


# -- moved runs -----------------------------------------------------------------------------------

_DONOR_TEXT = "The goods can be sent back within 30 days. "
EDITS: dict[str, tuple[Callable[[str], Parts], Callable[[str], Parts]]] = {
    "text before the picture": (
        lambda f: user(say(_DONOR_TEXT), medium(f), say("What is it?")),
        lambda f: user(say("Dear shop. " + _DONOR_TEXT), medium(f), say("What is it?")),
    ),
    "text behind the picture": (
        lambda f: user(say("Hi. "), medium(f), say("What is it? " + _DONOR_TEXT)),
        lambda f: user(say("Hi. "), medium(f), say("What, then, is it? " + _DONOR_TEXT)),
    ),
    "a picture put in before": (
        lambda f: user(say("Hi. "), medium(f), say(_DONOR_TEXT)),
        lambda f: user(say("Hi. "), medium(f, 3), medium(f), say(_DONOR_TEXT)),
    ),
    "a picture put in between": (
        lambda f: user(medium(f), say(_DONOR_TEXT), medium(f, 1), say("Which?")),
        lambda f: user(medium(f), say(_DONOR_TEXT), medium(f, 2), medium(f, 1), say("Which?")),
    ),
    "a picture taken out": (
        lambda f: user(medium(f, 2), say(_DONOR_TEXT), medium(f, 1), say("Which one?")),
        lambda f: user(say(_DONOR_TEXT), medium(f, 1), say("Which one?")),
    ),
    "a picture of another size": (
        lambda f: user(medium(f, 1), say(_DONOR_TEXT), medium(f), say("Which one is it?")),
        lambda f: user(medium(f, 2), say(_DONOR_TEXT), medium(f), say("Which one is it?")),
    ),
    "a picture moved to the end": (
        lambda f: user(medium(f), say(_DONOR_TEXT + "What is it?")),
        lambda f: user(say(_DONOR_TEXT + "What is it?"), medium(f)),
    ),
    "two pictures swapped": (
        lambda f: user(medium(f, 0), say(" or "), medium(f, 3), say(_DONOR_TEXT)),
        lambda f: user(medium(f, 3), say(" or "), medium(f, 0), say(_DONOR_TEXT)),
    ),
    "a picture instead of text": (
        lambda f: user(say("A lamp in blue. "), say(_DONOR_TEXT), medium(f, 1), say("Yes?")),
        lambda f: user(medium(f, 2), say(_DONOR_TEXT), medium(f, 1), say("Yes?")),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITS)
def test_what_moves_is_turned_right(oracles: Oracles, family: str, name: str) -> None:
    donor, target = (make(family) for make in EDITS[name])
    server = Server(oracles(family))
    server.serve(donor)
    stream = server.oracle.stream(target)
    result = server.prefill(stream)
    assert result.fallback is None
    assert result.plan.num_reused > 8
    server.assert_first_layer(target)
    told = provenance(result)
    assert told.exact + told.reused + told.recomputed == len(stream)
    known = {part_id(part) for message in donor for part in message["content"]}
    for use, part in zip(result.media, media_parts(target), strict=True):
        assert (use.source == "kv") == (part_id(part) in known), use


def part_id(part: dict[str, Any]) -> Any:
    if part["type"] == "text":
        return part["text"]
    content = part[part["type"]]
    return content.tobytes() if part["type"] == "image" else content[0].tobytes()


def media_parts(messages: Parts) -> Parts:
    return [p for m in messages for p in m["content"] if p["type"] != "text"]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_is_turned_right(oracles: Oracles, family: str, data: st.DataObject) -> None:
    server = Server(oracles(family))
    donor = prompt_of(family, data.draw)
    parts = list(donor[0]["content"])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(parts)))
        what = data.draw(st.sampled_from(["in", "out", "move"]))
        if what == "in":
            parts[at:at] = prompt_of(family, data.draw)[0]["content"][:1]
        elif len(parts) > 1:
            taken = parts.pop(min(at, len(parts) - 1))
            if what == "move":
                parts.insert(data.draw(st.integers(0, len(parts))), taken)
    server.serve(donor)
    target = user(*parts)
    result = server.prefill(server.oracle.stream(target))
    assert result.fallback is None
    server.assert_first_layer(target)
    # An edited request's own KV is found at its own positions again.
    again = server.serve(target)
    assert again.fallback is None
    server.prefill(server.oracle.stream(target))
    server.assert_first_layer(target)


def test_a_different_picture_is_one_replaced_run(server: Server) -> None:
    server.serve(user(say(_DONOR_TEXT), see(0), say("What is it? Tell me all.")))
    target = user(say(_DONOR_TEXT), see(4), say("What is it? Tell me all."))  # of the same size
    stream = server.oracle.stream(target)
    result = server.prefill(stream)
    [segment] = stream.media
    [use] = result.media
    assert use.source == "encoder"
    want = [*range(segment.start, segment.end), len(stream) - 1]
    assert result.plan.compute.tolist() == want


def test_one_pixel_is_another_picture(server: Server) -> None:
    one = picture(112, 84)
    other = one.copy()
    other.putpixel((60, 40), (1, 2, 3))
    server.serve(user({"type": "image", "image": one}, say("What is it?")))
    stream = server.oracle.stream(user({"type": "image", "image": other}, say("What is it?")))
    result = server.prefill(stream)
    [segment] = stream.media
    assert set(range(segment.start, segment.end)) <= set(result.plan.compute.tolist())


# -- encoders -------------------------------------------------------------------------------------


def test_features_of_a_known_picture_are_not_made_again(server: Server) -> None:
    server.serve(user(see(), say("What is it?")))
    result = server.prefill(server.oracle.stream(user(say("A"), see())), reuse="exact")
    assert [use.source for use in result.media] == ["features"]  # its KV is elsewhere
    assert (server.runs, server.hits) == (1, 1)


def test_reused_and_known_features_give_what_the_encoder_gives(server: Server) -> None:
    first = server.serve(user(see(), say("What is it?")))
    messages = user(say("Now: "), see(), say("What is it?"))
    stream = server.oracle.stream(messages)
    result = server.prefill(stream, reuse="exact")
    full = server.oracle.full(server.oracle.inputs(messages))
    assert first.media[0].content_hash == result.media[0].content_hash
    assert server.hits == 1
    assert torch.allclose(result.logits, full.logits[-1], atol=ATOL, rtol=0)


def test_one_picture_twice_runs_the_encoder_once(server: Server) -> None:
    result = server.serve(user(see(), say(" and again "), see()))
    assert [use.source for use in result.media] == ["encoder", "features"]
    assert (server.runs, server.hits) == (1, 1)


def test_without_reuse_nothing_is_taken_or_kept(server: Server) -> None:
    for _ in range(2):
        server.prefill(server.oracle.stream(user(see(), say("?"))), reuse="off")
    assert (server.runs, server.hits) == (2, 0)
    assert server.pool.store.bytes_by_tier() == {"host": 0}


def test_a_request_that_is_not_stored_leaves_no_features(server: Server) -> None:
    server.prefill(server.oracle.stream(user(see(), say("?"))), store=False)
    assert server.pool.store.bytes_by_tier() == {"host": 0}


def test_tenants_do_not_share_features(server: Server) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    server.prefill(stream)
    server.prefill(stream, OTHER_NS)
    assert (server.runs, server.hits) == (2, 0)


def test_features_that_are_gone_are_made_again(server: Server) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    first = server.prefill(stream)
    server.pool.store.delete(media_id(NS, stream.items[0]))
    again = server.prefill(stream)
    assert (server.runs, server.hits) == (2, 0)
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


def test_features_that_cannot_be_read_are_a_miss(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = server.oracle.stream(user(see(), say("What is it?")))
    first = server.prefill(stream)

    def broken(*_: Any) -> Any:
        raise KVUnavailableError("corrupt", "a bad sector")

    monkeypatch.setattr(server.pool.store, "get", broken)
    again = server.prefill(stream)
    assert server.encoder.counters["store_error"] == 1
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


def test_features_that_cannot_be_kept_fail_nobody(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(server.pool.store, "put", full)
    result = server.prefill(server.oracle.stream(user(see(), say("?"))))
    assert result.fallback is None
    assert server.encoder.counters["store_error"] == 1


def test_a_repair_inside_a_known_picture_needs_no_encoder(server: Server) -> None:
    server.serve(user(say(_DONOR_TEXT), see(), say("What is it?")))
    messages = user(say("Dear shop. " + _DONOR_TEXT), see(), say("What is it?"))
    stream = server.oracle.stream(messages)
    [segment] = stream.media

    class InThePicture(NoRepair):
        def positions(self, plan: ReusePlan) -> np.ndarray:
            return np.arange(segment.start + 1, segment.end)

    result = server.prefill(stream, policy=InThePicture())
    assert set(range(segment.start, segment.end)) & set(result.plan.repair.tolist())
    assert server.runs == 1
    assert [use.source for use in result.media] == ["features"]


def test_features_are_listed_by_namespace(server: Server) -> None:
    stream = server.oracle.stream(user(see(), say("and"), see(1)))
    server.prefill(stream)
    server.prefill(stream, OTHER_NS)
    store = server.pool.store
    assert media_ids(store, NS) == sorted(media_id(NS, item) for item in stream.items)
    assert len(media_ids(store)) == 4
    assert media_ids(store, namespace("tiny", "a third")) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[], DiskTier]]:
    yield lambda: DiskTier(tmp_path / "kv", 1 << 26)


def test_pictures_outlive_the_process(oracles: Oracles, disk: Callable[[], DiskTier]) -> None:
    oracle = oracles("qwen2_5_vl")
    first = Server(oracle, disk())
    first.serve(user(say(_DONOR_TEXT), see(2), say("What is it?")))
    assert first.pool.flush(20)
    first.pool.close()
    second = Server(oracle, disk())
    assert second.pool.counters["restored"] == 1
    target = user(say("Dear shop. " + _DONOR_TEXT), see(2), say("What is it?"))
    result = second.prefill(oracle.stream(target))
    assert [use.source for use in result.media] == ["kv"]
    assert result.plan.num_reused > 8
    second.assert_first_layer(target)
    other = oracle.stream(user(say("Hm. "), see(2)))
    assert [use.source for use in second.prefill(other, reuse="exact").media] == ["features"]
    assert second.runs == 0
    second.pool.close()
