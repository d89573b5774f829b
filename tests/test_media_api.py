"""The Python API with pictures and sound: what it takes, refuses, reuses and counts."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvshare_mm import (
    ConfigError,
    InvalidRequestError,
    KVShare,
    ModelLoadError,
    RequestOptions,
    RequestOutput,
    SamplingParams,
)
from kvshare_mm.models.support import Support
from kvshare_mm.reuse.admin import CacheAdmin
from kvshare_mm.store.media import media_ids
from kvshare_mm.stream import Modality

from .media_models import FAMILIES, FILMS
from .media_oracle import Oracle
from .modalities.media import RATE, encoded, film, picture, recorded, tone

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
OFF = RequestOptions(reuse="off", store=False)
POLICY = "Goods can be sent back within 30 days if they are unused. "


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def open_media(media_folder: Callable[[str], Path]) -> Iterator[Callable[..., KVShare]]:
    """Opens `KVShare` on the tiny random model of a family."""
    opened: list[KVShare] = []

    def make(family: str = "qwen2_5_vl", **options: Any) -> KVShare:
        options = {"embedder": None, "dtype": "float32", "min_gain_tokens": 4, **options}
        opened.append(KVShare(str(media_folder(family)), **options))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def user(*parts: dict[str, Any] | str) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def image(seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": encoded(picture(112, 84, seed))}


def sound(hertz: float = 440) -> dict[str, Any]:
    return {"type": "audio", "audio": recorded(tone(0.7, hertz), subtype="PCM_16")}


def stored(llm: KVShare, messages: list[dict[str, Any]], **options: Any) -> RequestOutput:
    output = llm.chat(messages, PARAMS, RequestOptions(**options))
    assert llm.flush(60)
    return output


def test_answers_are_transformers_own(
    open_media: Callable[..., KVShare], oracles: Callable[[str], Oracle]
) -> None:
    one, two = picture(112, 84), picture(56, 140, 1)
    messages = user({"type": "image", "image": one}, " or ", {"type": "image", "image": two}, "?")
    oracle = oracles("qwen2_5_vl")
    output = open_media().chat(messages, PARAMS)
    assert list(output.token_ids) == oracle.greedy(oracle.inputs(messages), 6)
    assert len(output.prompt_token_ids) == len(oracle.stream(messages))


def video(first: int = 0, frames: int = 6, **more: Any) -> dict[str, Any]:
    return {"type": "video", "video": [encoded(f) for f in film(frames, first=first)], **more}


@pytest.mark.parametrize("family", FILMS)
def test_answers_about_video_are_transformers_own(
    open_media: Callable[..., KVShare], oracles: Callable[[str], Oracle], family: str
) -> None:
    shown = {"type": "video", "video": film(5), "fps": 2}
    messages = user(POLICY, shown, " or ", {"type": "image", "image": picture(56, 140, 1)}, "?")
    oracle = oracles(family)
    output = open_media(family).chat(messages, PARAMS)
    assert list(output.token_ids) == oracle.greedy(oracle.inputs(messages), 6)


def test_a_video_goes_on_and_only_what_is_new_is_looked_at(
    open_media: Callable[..., KVShare],
) -> None:
    llm = open_media()
    stored(llm, user(POLICY, video(fps=2), "What is it?"))
    later = user(POLICY, video(2, fps=2), "What is it?")
    output = stored(llm, later)
    told = [(use.modality, use.source, use.label) for use in output.provenance.media]
    assert told == [
        ("video", "kv", "video 1 of 3, 112x84, seen as 112x84"),
        ("video", "kv", "video 2 of 3, 112x84, seen as 112x84"),
        ("video", "encoder", "video 3 of 3, 112x84, seen as 112x84"),
    ]
    assert llm.stats()["media"]["tower_runs"] == 4
    exact = llm.chat(later, PARAMS, RequestOptions(reuse="exact"))
    full = llm.chat(later, PARAMS, OFF)
    assert exact.token_ids == full.token_ids
    other = llm.chat(later, PARAMS, RequestOptions(cache_salt="another"))
    assert [use.source for use in other.provenance.media] == ["encoder"] * 3


def test_models_that_take_no_video_say_so(open_media: Callable[..., KVShare]) -> None:
    for family in set(FAMILIES) - set(FILMS):
        llm = open_media(family)
        assert Modality.VIDEO not in llm.modalities
        with pytest.raises(InvalidRequestError, match="video is not supported") as caught:
            llm.chat(user("See", video()))
        assert caught.value.field == "messages[0].content[1]"
        llm.close()


def test_similar_frames_are_shown(open_media: Callable[..., KVShare], clip_folder: Path) -> None:
    llm = open_media(media_embedder=str(clip_folder))
    stored(llm, user(POLICY, video(), "What is it?"))
    best, *others = llm.similar_media(video(2))
    assert best.label == "video 2 of 3, 112x84, seen as 112x84"
    assert best.similarity == pytest.approx(1, abs=1e-5)
    assert len(others) == 2


@pytest.mark.parametrize(
    ("family", "reuse"),
    [("qwen2_5_vl", "similar"), ("qwen2_5_vl", "exact"), ("qwen2_audio", "similar")],
)
def test_a_rephrased_question_looks_at_nothing_again(
    open_media: Callable[..., KVShare], family: str, reuse: Any
) -> None:
    llm = open_media(family)
    one, another = (sound(), sound(441)) if family == "qwen2_audio" else (image(), image(1))
    first = stored(llm, user(POLICY, one, "What is it?"))
    second = stored(llm, user(POLICY, one, "And what colour has it?"), reuse=reuse)
    sources = [use.source for use in (*first.provenance.media, *second.provenance.media)]
    assert sources == ["encoder", "kv"]
    assert second.provenance.exact > second.provenance.media[0].end
    assert llm.stats()["media"]["tower_runs"] == 1
    assert llm.stats()["requests"]["media_kv"] == 1
    full = llm.chat(user(POLICY, one, "And what colour has it?"), PARAMS, OFF)
    if reuse == "exact":
        assert second.token_ids == full.token_ids
    other = stored(llm, user(POLICY, another, "And what colour has it?"))
    assert [o.provenance.media[0].source for o in (full, other)] == ["encoder"] * 2


def test_another_picture_does_not_answer_for_the_first(open_media: Callable[..., KVShare]) -> None:
    llm = open_media(repair="auto:0.000001")
    stored(llm, user(POLICY, image(0), "What is it?"))
    target = user(POLICY, image(1), "What is it?")
    output = stored(llm, target)
    [use] = output.provenance.media
    assert use.source == "encoder"
    spans = [s for s in output.provenance.spans if s.start < use.end and s.end > use.start]
    assert {s.kind for s in spans} == {"recomputed"}
    assert output.provenance.exact > len(POLICY)
    assert output.token_ids == llm.chat(target, PARAMS, OFF).token_ids


def test_provenance_tells_of_media(open_media: Callable[..., KVShare]) -> None:
    llm = open_media("qwen2_5_omni_thinker")
    output = stored(llm, user(image(), "and", sound(), "?"))
    shown = [(u.modality, u.end - u.start, u.label) for u in output.provenance.media]
    assert shown == [
        ("image", 12, "112x84, seen as 112x84"),
        ("audio", 17, "0.70 s, 16000 Hz mono"),
    ]
    assert output.metrics.encode > 0
    told = output.to_dict()["provenance"]["media"]
    assert [m["content_hash"] for m in told] == [u.content_hash for u in output.provenance.media]
    assert all(len(m["content_hash"]) == 16 for m in told)
    frames = [picture(seed=i) for i in range(3)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    output = llm.chat(user({"type": "image", "image": data}, "?"), PARAMS)
    assert output.provenance.media[0].notes == ("the first of 3 frames",)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_audio"])
def test_all_ways_to_send_a_medium_are_one(
    open_media: Callable[..., KVShare], tmp_path: Path, family: str
) -> None:
    llm = open_media(family)
    parts: list[dict[str, Any]]
    if family == "qwen2_audio":
        file = tmp_path / "clip.flac"
        samples = (tone(0.7) * 32768).astype("int16")
        data = recorded(samples, subtype="PCM_16")
        file.write_bytes(recorded(samples, format="FLAC", subtype="PCM_16"))
        as_text = {"data": base64.b64encode(data).decode(), "format": "wav"}
        parts = [
            *({"type": "audio", "audio": each} for each in (data, str(file), (samples, RATE))),
            {"type": "input_audio", "input_audio": as_text},
        ]
    else:
        file = tmp_path / "photo.webp"
        data = encoded(picture(112, 84))
        file.write_bytes(encoded(picture(112, 84), "WEBP", lossless=True))
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        addresses = ({"url": str(file)}, {"url": url}, url)
        parts = [
            *({"type": "image", "image": each} for each in (data, picture(112, 84), file)),
            *({"type": "image_url", "image_url": each} for each in addresses),
        ]
    outputs = [stored(llm, user(POLICY, part, "What is it?")) for part in parts]
    assert len({o.token_ids for o in outputs}) == 1
    assert {o.provenance.recomputed for o in outputs[1:]} == {1}
    assert llm.stats()["media"] == {**llm.stats()["media"], "tower_runs": 1, "tower_hits": 0}


@pytest.mark.parametrize(
    ("part", "field", "says"),
    [
        ({"type": "image", "image": b"no picture"}, ".image", "no picture"),
        ({"type": "image", "image": "/nowhere.png"}, ".image", "no file"),
        ({"type": "image_url", "image_url": {"url": "data:,"}}, ".image_url", "image_url"),
        ({"type": "input_audio", "input_audio": {}}, "", "takes parts of type image"),
        ({"type": "video", "video": "clip.mp4"}, ".video", "video files are not read"),
        ({"type": "video", "video": [b"no picture"]}, ".video[0]", "no picture"),
        ({"type": "text", "text": "<|image_pad|>"}, ".text", "keep for media"),
        ({"type": "text", "text": "<|video_pad|>"}, ".text", "keep for media"),
    ],
)
def test_bad_parts_name_themselves_and_lose_nothing(
    open_media: Callable[..., KVShare], part: dict[str, Any], field: str, says: str
) -> None:
    llm = open_media()
    messages = [{"role": "system", "content": "Hi."}, *user("See", part)]
    before = llm.stats()
    for call in (llm.chat, llm.stream, lambda m: asyncio.run(llm.achat(m))):
        with pytest.raises(InvalidRequestError, match=says) as caught:
            call(messages)
        assert caught.value.field == f"messages[1].content[1]{field}"
    assert llm.stats() == before
    assert llm.chat(user(image(), "?"), PARAMS).finish_reason == "length"


def test_placeholders_in_text_are_refused(open_media: Callable[..., KVShare]) -> None:
    llm = open_media()
    with pytest.raises(InvalidRequestError, match="keep for media") as caught:
        llm.chat([{"role": "user", "content": "Look: <|image_pad|>"}])
    assert caught.value.field == "messages[0].content"
    for prompt in ("<|image_pad|>", llm.tokenizer("a<|image_pad|>")["input_ids"]):
        with pytest.raises(InvalidRequestError, match="parts of messages") as caught:
            llm.generate(prompt)
        assert caught.value.field == "prompt"


def test_a_template_without_a_place_for_media(open_media: Callable[..., KVShare]) -> None:
    llm = open_media()
    llm.tokenizer.chat_template = "{% for m in messages %}x{% endfor %}"
    with pytest.raises(InvalidRequestError, match="0 places for 1 items of image"):
        llm.chat(user(image()))


def test_more_pictures_than_the_context_holds(open_media: Callable[..., KVShare]) -> None:
    llm = open_media(max_model_len=64)
    with pytest.raises(InvalidRequestError, match="context holds 64"):
        llm.chat(user(*(image(i) for i in range(6)), "?"))


def test_paths_can_be_forbidden(open_media: Callable[..., KVShare], tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(picture()))
    llm = open_media(local_media=False)
    for part in (
        {"type": "image", "image": file},
        {"type": "image_url", "image_url": {"url": str(file)}},
        {"type": "image_url", "image_url": {"url": f"file://{file}"}},
    ):
        with pytest.raises(InvalidRequestError, match="may not be read"):
            llm.chat(user(part, "?"))
    assert llm.chat(user(image(), "?"), PARAMS).finish_reason == "length"


def test_limits_are_options(open_media: Callable[..., KVShare]) -> None:
    with pytest.raises(InvalidRequestError, match=r"at most 0\.005 million"):
        open_media(max_image_pixels=5_000).chat(user(image()))
    with pytest.raises(InvalidRequestError, match="more than 100 bytes"):
        open_media(max_media_bytes=100).chat(user(image()))


def test_similar_pictures_are_shown(open_media: Callable[..., KVShare], clip_folder: Path) -> None:
    llm = open_media(media_embedder=str(clip_folder))
    for seed in (0, 1, 0):
        stored(llm, user(POLICY, image(seed), "What is it?"))
    stored(llm, user(image(2), "?"), store=False)  # leaves nothing
    best, other = llm.similar_media(image(0))
    assert (best.times, other.times) == (2, 1)
    assert best.similarity == pytest.approx(1, abs=1e-5)
    assert best.similarity > other.similarity
    assert llm.similar_media(image(0), cache_salt="another") == []
    assert llm.stats()["media"]["embedded"] == 2
    with pytest.raises(InvalidRequestError) as caught:
        llm.similar_media({"type": "image", "image": b"no picture"})
    assert caught.value.field == "part.image"
    assert llm.cache.clear() == 2
    assert llm.similar_media(image(0)) == []
    with pytest.raises(ConfigError, match="media_embedder"):
        open_media().similar_media(image())


def test_clearing_forgets_pictures_too(open_media: Callable[..., KVShare]) -> None:
    llm = open_media()
    stored(llm, user(POLICY, image(), "What is it?"))
    donors = llm._parts.donors
    assert donors is not None
    assert len(media_ids(donors.store)) == 1
    assert CacheAdmin(donors, llm.tokenizer).clear() == 1
    assert media_ids(donors.store) == []
    assert donors.store.bytes_by_tier() == {"host": 0}
    again = stored(llm, user(POLICY, image(), "What is it?"))
    assert again.provenance.media[0].source == "encoder"


def test_a_broken_encoder_fails_one_request(
    open_media: Callable[..., KVShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_media()
    family = llm._parts.loaded.family

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(family, "encode", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.chat(user(image(), "?"), PARAMS)
    assert llm.chat(user(image(), "?"), PARAMS).finish_reason == "length"


def test_a_text_only_chat_of_a_model_that_sees(open_media: Callable[..., KVShare]) -> None:
    llm = open_media()
    output = llm.chat([{"role": "user", "content": "Hello?"}], PARAMS)
    assert output.provenance.media == ()
    assert llm.chat(user("Hel", "lo?"), PARAMS).token_ids == output.token_ids


def test_a_shipped_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise FileNotFoundError("no embedded model")

    monkeypatch.setattr("kvshare_mm.assets.folder", missing)
    with pytest.raises(ModelLoadError, match="'tiny-vl' is not installed"):
        KVShare("tiny-vl")


def test_a_model_without_reuse_still_sees(
    open_media: Callable[..., KVShare],
    oracles: Callable[[str], Oracle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    oracle = oracles("qwen2_5_omni_thinker")
    monkeypatch.setattr(
        "kvshare_mm.models.loader.check_support", lambda *_: Support("it is too strange")
    )
    llm = open_media("qwen2_5_omni_thinker")
    one = {"type": "image", "image": picture(112, 84)}
    clip = {"type": "audio", "audio": (tone(0.5), RATE)}
    messages = user("Look: ", one, " Listen: ", clip, "?")
    for _ in range(2):
        output = llm.chat(messages, PARAMS)
        assert list(output.token_ids) == oracle.greedy(oracle.inputs(messages), 6)
        assert output.provenance.declined == "unsupported_model"
    assert llm.stats()["media"]["tower_runs"] == 4


def test_many_at_once_get_their_own_answers(open_media: Callable[..., KVShare]) -> None:
    """Pictures of several sizes are decoded together, each from its own last position."""
    llm = open_media(max_num_seqs=3)
    sizes = [(56, 56), (112, 84), (28, 140), (168, 56)]
    asked = [
        user("Look: ", {"type": "image", "image": picture(*sizes[i % 4], seed=i)}, "What is it?")
        for i in range(8)
    ]
    alone = [llm.chat(messages, PARAMS, OFF).token_ids for messages in asked]
    assert len(set(alone)) > 4

    async def together(options: RequestOptions) -> list[RequestOutput]:
        return await asyncio.gather(*(llm.achat(m, PARAMS, options) for m in asked))

    for options in (OFF, RequestOptions(reuse="exact")):
        assert [o.token_ids for o in asyncio.run(together(options))] == alone
