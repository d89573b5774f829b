"""Requests with pictures in the real engine: what is kept is not seen again, what is new is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.model_executor.model_loader import utils as loading
from vllm.model_executor.models.registry import ModelRegistry
from vllm.multimodal.inputs import PlaceholderRange

from kvshare_mm.assets.shop.dialogues import Request, random_customer
from kvshare_mm.assets.shop.similar import random_request, similar
from kvshare_mm.models.loader import locate
from kvshare_mm.stream import MediaItem, Modality, SegmentStream, mrope_positions
from kvshare_mm.vllm import compat
from kvshare_mm.vllm.media import request_stream
from kvshare_mm.vllm.pictures import prompt_of

from . import engines
from .engines import (
    Shared,
    shared_engine,
    stock_engine,
    stock_tokens,
    summary,
    tokens,
)

pytestmark = pytest.mark.vllm

BLOCK = 32
LENGTH = 12


@pytest.fixture(scope="module")
def engine() -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 8, "recompute_per_step": 32}
    # A few requests at once must preempt each other.
    with shared_engine(
        locate("tiny-vl"), options, max_model_len=512, num_gpu_blocks_override=20
    ) as made:
        yield made


@pytest.fixture(scope="module")
def stock() -> Iterator[Any]:
    with stock_engine(locate("tiny-vl"), max_model_len=512) as made:
        yield made


@pytest.fixture(scope="module")
def seen(engine: Shared) -> list[int]:
    """How many pictures the vision tower got, call by call."""
    calls: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["grid_thw"]))

    whole = compat._workers[0]().get_model()  # type: ignore[union-attr]
    whole.visual.register_forward_pre_hook(count, with_kwargs=True)
    return calls


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    if "engine" not in request.fixturenames:
        yield
        return
    engine: Shared = request.getfixturevalue("engine")
    engine.forget()
    engine.llm.llm_engine.reset_encoder_cache()
    with engine.keeping_its_blocks():
        yield


def stream_of(request: Request) -> SegmentStream:
    return engines.stream_of("tiny-vl", request.messages())


def serve(engine: Shared, stream: SegmentStream, **knobs: Any) -> Any:
    """Served as if vLLM's encoder had never run."""
    engine.llm.llm_engine.reset_encoder_cache()
    output = engine.serve(prompt_of(stream), LENGTH, **knobs)
    assert list(output.prompt_token_ids) == stream.token_ids.tolist()
    return output


def loaded(output: Any) -> int:
    """Where vLLM's own prefill began."""
    return sum(int(summary(output)[kind]) for kind in ("exact", "reused", "gaps"))


def inquiry(seed: int, topic: str = "my_fee", num_photos: int = 1) -> Request:
    """Greeting, photos, question, this one longer than what is always repaired."""
    rng = random.Random(seed)
    made = random_request(rng, topic, num_photos=num_photos, num_fillers=3)
    return replace(
        made,
        question=replace(made.question, phrasing={"my_fee": 0, "code": 1}[topic]),
        wording=replace(made.wording, photos_first=False),
    )


def by_another(request: Request, seed: int = 1) -> Request:
    """The same photos and question of another customer, whose name or number is longer."""
    for number in itertools.count(seed):
        other = replace(request, customer=random_customer(random.Random(number)))
        if len(stream_of(other)) != len(stream_of(request)):
            return other
    raise AssertionError


def on_its_own(engine: Shared, stock: Any, stream: SegmentStream, answer: list[int]) -> None:
    """Afterwards it gets stock vLLM's tokens with reuse off; so does who goes on from there."""
    prompt = prompt_of(stream)
    longer = {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *answer]}
    for each in (prompt, longer):
        replay = engine.serve(each, LENGTH, reuse="off")
        assert tokens(replay) == stock_tokens(stock, each, LENGTH)


@pytest.mark.parametrize("topic", ["my_fee", "code"])
def test_the_same_photo_is_not_seen_again(
    engine: Shared, stock: Any, seen: list[int], topic: str
) -> None:
    for seed in range(3):
        engine.forget()
        first = inquiry(seed, topic)
        target = stream_of(by_another(first))
        (photo,) = target.media
        seen.clear()
        assert summary(serve(engine, stream_of(first)))["declined"] == "no_donor"
        assert seen == [1]
        seen.clear()
        output = serve(engine, target)
        use = summary(output)
        assert seen == [], "the tower ran for a photo that was kept"
        assert use["reused"] >= photo.end - photo.start
        assert loaded(output) >= photo.end
        assert use["declined"] is None
        assert output.num_cached_tokens == use["exact"] + use["reused"]
        assert tokens(output) == stock_tokens(stock, prompt_of(target), LENGTH)
        on_its_own(engine, stock, target, tokens(output))


def test_another_photo_is_seen(engine: Shared, stock: Any, seen: list[int]) -> None:
    for seed in range(3):
        engine.forget()
        first = inquiry(seed, "code")
        first = replace(first, wording=replace(first.wording, photos_first=True))
        answer = serve(engine, stream_of(first))
        other = similar(first, "other_picture", random.Random(seed))
        target = stream_of(replace(other, desk=replace(first.desk, city="Rome")))
        (photo,) = target.media
        seen.clear()
        output = serve(engine, target, max_divergence=0.1)
        assert seen == [1]
        assert loaded(output) <= photo.start
        assert summary(output)["reused"] > 0
        assert tokens(output) == stock_tokens(stock, prompt_of(target), LENGTH)
        assert tokens(output) != tokens(answer)
        on_its_own(engine, stock, target, tokens(output))
    engine.forget()
    serve(engine, stream_of(first))
    output = serve(engine, target, repair="none")
    assert summary(output)["declined"] == "new_picture", "words behind it are known, but not loaded"
    assert loaded(output) <= photo.start


def test_a_load_ends_before_the_first_new_photo(
    engine: Shared, stock: Any, seen: list[int]
) -> None:
    first = inquiry(5, "code", num_photos=2)
    other = by_another(first)
    new = similar(first, "other_picture", random.Random(9)).photos[0]
    serve(engine, stream_of(first))

    behind = stream_of(replace(other, photos=(first.photos[0], new)))
    kept, fresh = behind.media
    seen.clear()
    output = serve(engine, behind)
    assert seen == [1]
    assert kept.end <= loaded(output) <= fresh.start
    assert summary(output)["reused"] >= kept.end - kept.start
    on_its_own(engine, stock, behind, tokens(output))

    engine.forget()
    serve(engine, stream_of(first))
    before = stream_of(replace(other, photos=(new, first.photos[1])))
    seen.clear()
    output = serve(engine, before)
    assert sum(seen) == 2, "vLLM computes what is behind a new photo"
    assert loaded(output) <= before.media[0].start
    on_its_own(engine, stock, before, tokens(output))


def test_prefix_caching_covers_a_part_of_a_photo(
    engine: Shared, stock: Any, seen: list[int]
) -> None:
    for seed in itertools.count():
        first = inquiry(seed)
        target = stream_of(replace(first, question=replace(first.question, phrasing=3)))
        (photo,) = target.media
        if photo.start % BLOCK > BLOCK - 8:
            break
    serve(engine, stream_of(first))
    seen.clear()
    output = serve(engine, target, reuse="exact")
    assert photo.start < photo.end // BLOCK * BLOCK < photo.end, "what vLLM finds ends in the photo"
    assert seen == []
    assert summary(output)["exact"] >= photo.end
    assert tokens(output) == stock_tokens(stock, prompt_of(target), LENGTH)
    # Nothing of it is approximate, so everybody may find it.
    assert summary(serve(engine, target, reuse="off"))["exact"] >= photo.end // BLOCK * BLOCK
    # Without the donor the rest of the photo is vLLM's to compute, and its tower runs.
    engine.forget()
    serve(engine, stream_of(first), store=False)
    seen.clear()
    output = serve(engine, target)
    assert seen == [1]
    assert loaded(output) == photo.end // BLOCK * BLOCK
    assert tokens(output) == stock_tokens(stock, prompt_of(target), LENGTH)


def test_repairs_that_reach_into_a_photo_leave_it_to_vllm(
    engine: Shared, stock: Any, seen: list[int]
) -> None:
    first = inquiry(2)
    target = stream_of(by_another(first))
    (photo,) = target.media
    serve(engine, stream_of(first))
    for repair in ("tail:20", "window:100000"):
        seen.clear()
        output = serve(engine, target, repair=repair, store=False)
        assert seen == [1]
        assert loaded(output) <= photo.start
        assert engine.llm.reset_prefix_cache()
    assert summary(output)["declined"] == "divergence"
    assert tokens(output) == stock_tokens(stock, prompt_of(target), LENGTH)


def test_a_preempted_request_whose_kept_photo_is_gone(
    engine: Shared, stock: Any, seen: list[int]
) -> None:
    first = inquiry(0)
    target = stream_of(by_another(first))
    serve(engine, stream_of(first))
    engine.llm.llm_engine.reset_encoder_cache()
    engine.add("one", prompt_of(target), LENGTH)
    seen.clear()
    requests = engine.vllm_scheduler.requests
    while not any(r.num_output_tokens >= 2 for r in requests.values()):
        assert not engine.step()
    assert seen == []
    for node in engine.catalogue.nodes():
        engine.catalogue.remove(node.node_id)
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    output = engine.run()["one"]
    assert seen == [1]
    assert tokens(output) == stock_tokens(stock, prompt_of(target), LENGTH)
    on_its_own(engine, stock, target, tokens(output))


def test_a_prompt_that_cannot_be_read_is_a_miss(
    engine: Shared, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = Mock(side_effect=ValueError("a grid of two numbers"))
    monkeypatch.setattr("kvshare_mm.vllm.scheduler_side.request_stream", fail)
    stream = stream_of(inquiry(0))
    output = serve(engine, stream)
    assert summary(output)["declined"] == "lookup_error"
    assert tokens(output) == stock_tokens(stock, prompt_of(stream), LENGTH)
    assert not engine.catalogue.nodes()


REQUESTS = [
    each
    for seed in (1, 2)
    for first in [inquiry(seed), inquiry(seed, "code", num_photos=2)]
    for each in [
        first,
        by_another(first),
        similar(first, "other_picture", random.Random(seed)),
        replace(first, photos=()) if first.question.topic == "my_fee" else by_another(first, 50),
    ]
    if each.photos or not each.question.needs_photo
]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    burst=st.lists(
        st.tuples(
            st.sampled_from(REQUESTS),
            st.sampled_from(["similar", "similar", "exact", "off"]),
            st.integers(1, 30),
            st.integers(0, 4),
        ),
        min_size=2,
        max_size=5,
    )
)
def test_no_pollution(
    engine: Shared, stock: Any, burst: list[tuple[Request, str, int, int]]
) -> None:
    """Whatever came before, a prompt with reuse off gets stock vLLM's tokens."""
    streams = [stream_of(request) for request, *_ in burst]
    done: dict[str, Any] = {}
    for number, (stream, (_, reuse, length, steps)) in enumerate(zip(streams, burst, strict=True)):
        engine.add(str(number), prompt_of(stream), length, reuse=reuse)
        for _ in range(steps):
            done.update({o.request_id: o for o in engine.step()})
    done.update(engine.run())
    for number, (stream, (_, reuse, length, _)) in enumerate(zip(streams, burst, strict=True)):
        answer = tokens(done[str(number)])
        if reuse != "similar":
            assert answer == stock_tokens(stock, prompt_of(stream), length)
        on_its_own(engine, stock, stream, answer)


QWENS = ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen2_5Omni"]


def positions_of(model: str) -> Any:
    """As a scheduler gets them, which has a configuration alone."""
    config = {
        "vision_config": SimpleNamespace(spatial_merge_size=2, tokens_per_second=2),
        "video_token_id": 11,
        "vision_start_token_id": 12,
        "vision_end_token_id": 13,
    }
    hf_config = SimpleNamespace(**config)
    if model == "Qwen2_5Omni":
        hf_config = SimpleNamespace(thinker_config=hf_config)
    resolved = ModelRegistry._try_load_model_cls(f"{model}ForConditionalGeneration")
    assert resolved is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "get_model_cls", lambda _: resolved)
        asked = SimpleNamespace(uses_mrope=True, mrope_num_dims=3, hf_config=hf_config)
        return compat.media_positions(SimpleNamespace(model_config=asked))


def picture(offset: int, rows: int, columns: int, name: str = "a", **other: Any) -> Any:
    grid = SimpleNamespace(data=torch.tensor([1, 2 * rows, 2 * columns]))
    made = {
        "modality": "image",
        "identifier": name,
        "data": {"image_grid_thw": grid},
        "mm_position": PlaceholderRange(offset, rows * columns),
    }
    return SimpleNamespace(**{**made, **other})


@pytest.mark.parametrize("model", QWENS)
@given(
    layout=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4
    ),
    end=st.integers(1, 6),
)
def test_positions_are_what_the_native_engine_gives(
    model: str, layout: list[tuple[int, int, int]], end: int
) -> None:
    ids: list[int] = []
    features, items = [], []
    for number, (text, rows, columns) in enumerate(layout):
        ids += [1] * text
        features.append(picture(len(ids), rows, columns, str(number)))
        items.append(MediaItem(Modality.IMAGE, "ab", rows * columns, (rows, columns), "", dict))
        ids += [9] * (rows * columns)
    ids += [1] * end
    stream = request_stream(ids, features, positions_of(model))
    assert stream is not None and stream.positions is not None
    expected = mrope_positions(stream.segments, items)
    assert np.array_equal(stream.positions, expected)


@pytest.mark.parametrize("model", QWENS)
@pytest.mark.parametrize(
    "other",
    [
        {"modality": "prompt_embeds"},
        {"data": None},
        {"data": {"address": 1}},
        {"data": {"image_grid_thw": SimpleNamespace(data=None)}},
        {"data": {"image_grid_thw": SimpleNamespace(data=torch.tensor([1, 4, 6]))}},
        {"modality": "video"},
        {"modality": "audio"},
    ],
)
def test_what_a_model_does_not_tell_is_declined(model: str, other: dict[str, Any]) -> None:
    """Such as data that only the workers have: a cache in shared memory."""
    ids, positions = [9, 9, 9, 9, 7], positions_of(model)
    assert request_stream(ids, [picture(0, 2, 2)], positions) is not None
    assert request_stream(ids, [picture(0, 2, 2, **other)], positions) is None


def test_a_model_with_more_axes_is_declined() -> None:
    asked = SimpleNamespace(uses_mrope=True, mrope_num_dims=4)
    assert compat.media_positions(SimpleNamespace(model_config=asked)) is None
