"""Pictures whose positions see each other: never cut, and exact only where all of one is."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm import KVShare, RequestOptions
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.models.loader import load_model
from kvshare_mm.native.audit import Audit, Auditor
from kvshare_mm.native.inputs import MediaInputs, fitting, model_inputs, seen
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.request import RequestSpec
from kvshare_mm.reuse.plan import Promise, ReusePlan
from kvshare_mm.reuse.repair import NoRepair
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import SegmentStream

from ..media_oracle import Oracle
from .asking import params
from .media_server import ATOL, DONOR_TEXT, MAX_LEN, NS, Oracles, Server, say, see, user


@pytest.fixture
def server(oracles: Oracles) -> Server:
    return Server(oracles("gemma3"))


@pytest.fixture
def changed(
    media_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[[dict[str, Any]], Path]:
    """A Gemma 3 whose language part is configured otherwise."""

    def folder(text: dict[str, Any]) -> Path:
        made = shutil.copytree(media_folder("gemma3"), tmp_path / "changed")
        config = json.loads((made / "config.json").read_text())
        config["text_config"] |= text
        (made / "config.json").write_text(json.dumps(config))
        return made

    return folder


def encoded(server: Server, stream: SegmentStream) -> MediaInputs:
    features = tuple(
        (segment.start, server.encoder.features(item, NS)[0])
        for segment, item in zip(stream.media, stream.items, strict=True)
    )
    return MediaInputs(stream.positions, features)


def assert_full(oracle: Oracle, runner: SlotRunner) -> None:
    messages = user(say("One: "), see(), say(" and "), see(1), say("?"))
    stream, full = oracle.stream(messages), oracle.full(oracle.inputs(messages))
    n, media = len(stream), encoded(Server(oracle), stream)
    logits = runner.prefill(0, stream.token_ids, np.arange(n), media=media)
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    for got, want in zip(runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, :n], want, atol=ATOL, rtol=0)


# -- chunks ---------------------------------------------------------------------------------------

WHOLE = [(10, 20), (20, 30), (42, 50)]


@pytest.mark.parametrize(
    ("compute", "most", "want"),
    [
        (range(60), 5, 5),
        (range(60), 10, 10),
        (range(60), 12, 10),
        (range(60), 25, 20),
        (range(60), 36, 36),
        (range(60), 99, 60),
        (range(10, 60), 1, 10),
        (range(13, 60), 1, 7),  # what is before is kept
        ([3, 14, 16, 45], 2, 1),
        ([14, 16, 45], 1, 2),
        ([14, 45], 1, 1),
    ],
)
def test_a_chunk_ends_before_a_picture_or_behind_it(compute: Any, most: int, want: int) -> None:
    assert fitting(np.array(compute), most, WHOLE) == want
    assert fitting(np.array(compute), most, ()) == min(most, len(compute))


@given(st.sets(st.integers(0, 59), min_size=1), st.integers(1, 40))
def test_no_picture_is_in_two_chunks(chosen: set[int], most: int) -> None:
    left = np.array(sorted(chosen))
    while len(left):
        length = fitting(left, most, WHOLE)
        assert 0 < length <= max(most, 10)
        chunk, left = left[:length], left[length:]
        for start, end in WHOLE:
            at = np.concatenate((chunk[-1:], left[:1]))
            assert not (len(left) and ((start <= at) & (at < end)).all())


def test_who_sees_what() -> None:
    index = torch.tensor([0, 9, 10, 15, 19, 20, 31, 49, 50])
    got = seen(index, WHOLE)
    assert got is not None and got.tolist() == [0, 9, 19, 19, 19, 29, 31, 49, 50]
    assert seen(index, ()) is None


# -- beside transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 40, 4096])
def test_a_window_may_be_shorter_than_a_picture(
    changed: Callable[[dict[str, Any]], Path], chunk: int
) -> None:
    """A picture's positions do not see each other whole then, in transformers neither."""
    oracle = Oracle(changed({"sliding_window": 20}))
    assert oracle.processor.image_seq_length > 20
    assert_full(oracle, SlotRunner(oracle.loaded, 1, MAX_LEN, chunk))


def test_the_kernels_see_pictures_as_transformers_does(
    oracles: Oracles, media_folder: Callable[[str], Path]
) -> None:
    loaded = load_model(str(media_folder("gemma3")), dtype="float32", attention_backend="triton")
    assert_full(oracles("gemma3"), SlotRunner(loaded, 1, MAX_LEN, 40))


def test_an_engine_of_small_chunks_answers_as_transformers(
    oracles: Oracles, media_folder: Callable[[str], Path]
) -> None:
    oracle = oracles("gemma3")
    exact = RequestOptions(reuse="exact")
    with KVShare(str(media_folder("gemma3")), dtype="float32", prefill_chunk=16) as llm:
        for text, source in (("What is it?", "encoder"), ("What is that?", "kv")):
            messages = user(say(DONOR_TEXT), see(), say(text))
            output = llm.chat(messages, params(8), exact)
            assert list(output.token_ids) == oracle.greedy(oracle.inputs(messages), 8)
            assert [use.source for use in output.provenance.media] == [source]
        moved = user(say("Hello. " + DONOR_TEXT), see(), say("What is that?"))
        output = llm.chat(moved, params(8))
        assert [use.source for use in output.provenance.media] == ["kv"]
        assert llm.stats()["media"]["tower_runs"] == 1
        # The processor would make a picture of it.
        with pytest.raises(InvalidRequestError, match="keep for media"):
            llm.chat(user(say("Look: <|vision_start|>")))


def test_audits_cut_no_picture(server: Server) -> None:
    messages = user(say(DONOR_TEXT), see(), say("What is it?"), see(1), say("And this?"))
    stream, inputs = server.oracle.stream(messages), server.oracle.inputs(messages)
    assert any(segment.start < 64 < segment.end for segment in stream.media)
    answer = [5, 17, 80, 3]
    spec = RequestSpec(stream, "", SamplingParams(max_tokens=4), NS)
    audit = Audit(spec, ReusePlan(len(stream)), Promise("", 1.0, 1.0, 1.0), answer)
    audit.begin(0)
    auditor = Auditor(server.runner, Mock(), 1.0, 1e9, encoder=server.encoder)
    while audit.done < audit.length:
        auditor._advance(audit, lambda: False)
    more = torch.tensor([answer[:-1]])
    inputs["input_ids"] = torch.cat((inputs["input_ids"], more), 1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        inputs[name] = torch.cat((inputs[name], torch.full_like(more, value)), 1)
    full = server.oracle.full(inputs)
    for got, want in zip(server.runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, : audit.length], want, atol=ATOL, rtol=0)


def test_what_pictures_look_at_is_not_taken_for_reading(server: Server) -> None:
    stream = server.oracle.stream(user(say("What is it? "), see(), say("And?")))
    [picture] = stream.media
    rows: list[list[int]] = []

    def record(layer: int, query: Any, key: Any, index: torch.Tensor, *_: Any) -> None:
        assert query.shape[1] == len(index)
        rows.append(index.tolist())

    n = len(stream)
    media = encoded(server, stream)
    server.runner.prefill(0, stream.token_ids, np.arange(n), None, media, record)
    alone = [i for i in range(n) if not picture.start <= i < picture.end - 1]
    assert rows == [alone] * 4


# -- what is exact --------------------------------------------------------------------------------


def test_a_picture_that_is_computed_in_part_is_as_approximate_as_the_rest_of_it(
    server: Server,
) -> None:
    """Its first positions have seen the last, which were kept from elsewhere."""
    server.serve(user(say(DONOR_TEXT), see(), say("What is it? Tell me all.")))
    messages = user(say("Now this one, if you will: "), see(), say("What is it? Tell me all."))
    stream = server.oracle.stream(messages)
    [picture] = stream.media

    class UpToTheMiddle(NoRepair):
        def positions(self, plan: ReusePlan) -> np.ndarray:
            return np.arange(picture.start + 10)

    result = server.prefill(stream, policy=UpToTheMiddle())
    assert int(np.argmax(result.plan.reused)) == picture.start + 10
    full = server.oracle.full(server.oracle.inputs(messages))
    k = server.runner.slot_kv(0)[0]
    error = (k[:, :, : len(stream)] - full.k).abs().amax((0, 1, 3))
    assert (error[: picture.start] < ATOL).all() and error[picture.start] > 0.01
    server.prefiller.save(0, stream, NS, result)
    [node] = [node for node in server.pool.nodes() if len(node) == len(stream)]
    assert node.exact_len == picture.start


def test_a_model_that_must_be_served_without_partial_attention_is_served_with_text_alone(
    changed: Callable[[dict[str, Any]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = changed({"rope_parameters": {"full_attention": rope, "sliding_attention": rope}})
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(folder), dtype="float32")
    assert loaded.unsupported is not None and "dynamic" in loaded.unsupported
    assert loaded.family is None and loaded.processor is None
    assert any("text alone" in record.message for record in caplog.records)


def test_a_folder_that_does_not_say_how_pictures_are_read_is_served_with_text_alone(
    media_folder: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(media_folder("gemma3"), tmp_path / "text")
    for file in ("preprocessor_config.json", "processor_config.json"):
        (folder / file).unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(folder), dtype="float32")
    assert loaded.family is None and loaded.processor is None and loaded.unsupported is None
    assert any("text alone" in record.message for record in caplog.records)


def test_what_stands_for_a_picture_need_not_be_in_the_vocabulary() -> None:
    table = torch.nn.Embedding(10, 4)
    ids, index = torch.tensor([3, 99, 99, 5]), torch.arange(4)
    media = MediaInputs(features=((1, torch.ones(2, 4)),))
    made = model_inputs(Mock(get_input_embeddings=lambda: table), ids, index, media)
    expected = torch.cat((table.weight[3:4], torch.ones(2, 4), table.weight[5:6]))
    assert torch.equal(made["inputs_embeds"][0], expected)
    assert ids.tolist() == [3, 99, 99, 5]
