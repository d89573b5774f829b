"""`KVShare("tiny-vl", engine="vllm")` takes pictures in messages as the native engine does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm import KVShare, RequestOptions, SamplingParams, assets
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.stream import Modality

pytestmark = pytest.mark.vllm

_OWN = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
_PARAMS = SamplingParams(max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[KVShare]:
    with KVShare("tiny-vl", engine="vllm", max_model_len=1024, engine_options=_OWN) as started:
        yield started


def samples() -> list[tuple[list[dict[str, Any]], str]]:
    """Messages, their pictures as paths, and the right answers."""
    folder = Path(assets.folder("tiny-vl")) / "samples"
    found = []
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for message in sample["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = str(folder / part["image"])
        found.append((sample["messages"], sample["answer"]))
    return found


def test_the_samples_are_answered_right(llm: KVShare) -> None:
    assert llm.modalities == {Modality.IMAGE}
    right = []
    for messages, want in samples()[:8]:
        output = llm.chat(messages, _PARAMS, RequestOptions(reuse="off"))
        assert output.prompt_token_ids == llm.tokenize(messages)
        assert [use.source for use in output.provenance.media] == ["encoder"]
        right.append(output.text == want)
    assert sum(right) >= 7


def test_a_picture_that_was_sent_before_is_told(llm: KVShare) -> None:
    system, user = samples()[0][0]
    picture, words = user["content"]
    assert words["type"] == "text"
    alone = RequestOptions(cache_salt="told")
    first = llm.chat([system, user], _PARAMS, alone)
    time.sleep(1)  # stored behind the answer
    name = {"type": "text", "text": "My name is Viktor, which is none of your business. "}
    again = [system, {"role": "user", "content": [name, picture, words]}]
    options = RequestOptions(cache_salt="told", store=False)
    use = llm.chat(again, _PARAMS, options).provenance
    (photo,) = use.media
    assert photo.source == "kv"
    assert photo.content_hash == first.provenance.media[0].content_hash
    assert use.reused >= photo.end - photo.start
    assert use.exact + use.reused + use.recomputed == len(llm.tokenize(again))
    other = llm.chat(again, _PARAMS, RequestOptions(cache_salt="other", store=False)).provenance
    assert (other.exact, other.reused) == (0, 0)
    assert [m.source for m in other.media] == ["encoder"]


def test_mistakes_are_named_at_the_door(llm: KVShare) -> None:
    def ask(part: dict[str, Any]) -> None:
        llm.chat([{"role": "user", "content": [part]}], _PARAMS)

    with pytest.raises(InvalidRequestError, match="there is no file"):
        ask({"type": "image_url", "image_url": {"url": "no-such-lamp.png"}})
    with pytest.raises(InvalidRequestError, match="video"):
        ask({"type": "video_url", "video_url": {"url": "lamp.mp4"}})
    with pytest.raises(InvalidRequestError, match="stands for a picture"):
        llm.generate(llm.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "a"]))
    with pytest.raises(InvalidRequestError, match="magic"):
        llm.generate("Hello", _PARAMS, RequestOptions(repair="magic:0.2"))
