"""Pictures and sound in requests: what reaches the engine, and what never gets that far."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvshare_mm.apps.server import cli
from kvshare_mm.apps.server.media import resolved
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.modalities.fetch import FetchPolicy, MediaFetcher

from ...modalities.media import encoded, film
from ..conftest import Run
from .conftest import Running, Start, image_part

_WAV = base64.b64encode(b"RIFF....WAVE").decode()


class Fetched(MediaFetcher):
    """Stands for the network: every https URL has its own name as content."""

    async def afetch(self, url: str) -> bytes:
        return url.encode() if url.startswith("https:") else await super().afetch(url)


def resolve(
    *parts: Any, fetcher: MediaFetcher | None = None, most: int = 3
) -> list[dict[str, Any]]:
    message = {"role": "user", "content": list(parts)}
    return asyncio.run(resolved([message], fetcher or Fetched(), most))


def picture(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def plain(colour: str) -> dict[str, Any]:
    return image_part(encoded(Image.new("RGB", (56, 56), colour)))


def video(*frames: Image.Image, fps: float | None = None) -> dict[str, Any]:
    files = (base64.b64encode(encoded(frame, "JPEG")).decode() for frame in frames)
    part = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(files)}}
    return part if fps is None else {**part, "fps": fps}


def sound(data: object = _WAV, form: object = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": form}}


def test_parts_arrive_in_order() -> None:
    [message] = resolve(
        {"type": "text", "text": "see"},
        picture("https://a.example/1"),
        sound(),
        picture("data:,two"),
        {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,YQ==,Yg=="}, "fps": 2},
        {"type": "text", "text": "!"},
        most=4,
    )
    assert message["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": b"https://a.example/1"},
        {"type": "input_audio", "input_audio": {"data": _WAV, "format": "wav"}},
        {"type": "image_url", "image_url": b"two"},
        {"type": "video_url", "video_url": [b"a", b"b"], "fps": 2},
        {"type": "text", "text": "!"},
    ]


def test_only_role_and_content_pass() -> None:
    told = [
        {"role": "developer", "content": "be brief", "name": "x", "image": "/etc/passwd"},
        {"role": "user", "content": "hello", "tool_calls": None},
    ]
    assert asyncio.run(resolved(told, Fetched(), 1)) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([{"type": "image", "image": "/etc/passwd"}], "is of type 'image'"),
        ([{"type": "audio", "audio": "/etc/passwd"}], "is of type 'audio'"),
        ([{"type": "video", "video": ["/etc/passwd"]}], "is of type 'video'"),
        ([{"type": "video_url"}], "must be a URL"),
        ([{"type": "video_url", "video_url": ["/etc/passwd"]}], "must be a URL"),
        ([{"type": "video_url", "video_url": {"url": "https://x"}}], "video files are not read"),
        ([{"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"}], "send frames"),
        (
            [{"type": "video_url", "video_url": "data:video/jpeg;base64,QUJD,*"}],
            r"^messages\[0\].content\[0\].video_url\[1\] is no base64",
        ),
        ([{"type": "video_url", "video_url": "data:video/jpeg;base64,YQ=="}] * 4, "more than 3"),
        ([{"type": "text"}], "must be text"),
        ([{"type": "text", "text": 5}], "must be text"),
        ([{"type": "image_url"}], "must be a URL"),
        ([picture(None)], "must be a URL"),
        ([picture(["https://x"])], "must be a URL"),
        ([picture("data:,")], "nothing"),
        ([picture("/etc/passwd")], "not fetched"),
        ([picture("data:,x")] * 4, "more than 3"),
        ([sound()] * 4, "more than 3"),
        ([{"type": "input_audio"}], "base64"),
        ([sound(data=b"x")], "base64"),
        ([sound(form="ogg")], "wav, mp3, flac"),
        ([sound(form=None)], "wav, mp3, flac"),
        ([sound(form=["wav"])], "wav, mp3, flac"),
    ],
)
def test_malformed_parts_are_refused_with_their_place(parts: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        resolve(*parts)
    assert str(error.value.field).startswith("messages[0].content[")


def test_large_sound_is_refused_before_it_is_decoded() -> None:
    fetcher = MediaFetcher(FetchPolicy(max_bytes=30))
    resolve(sound(data="A" * 40), fetcher=fetcher)
    with pytest.raises(InvalidRequestError, match="more than 30 bytes"):
        resolve(sound(data="A" * 60), fetcher=fetcher)


def test_the_largest_file_is_the_same_for_server_and_engine(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[KVShareConfig, ServerOptions]] = []
    monkeypatch.setattr(cli, "_load", lambda config: config)
    monkeypatch.setattr(
        "kvshare_mm.apps.server.run.serve", lambda load, options, *_: told.append((load(), options))
    )
    reply = run("serve", "tiny-vl", "--port", 0, "--max-media-mib", 100)
    assert reply.exit_code == 0, reply.output
    [(config, options)] = told
    assert config.max_media_bytes == options.fetch.max_bytes == 100 << 20


def test_a_model_of_text_refuses_pictures_by_name(shared: Running) -> None:
    reply = shared.chat("", messages=[{"role": "user", "content": [plain("red")]}])
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert "messages[0]" in error["param"]
    assert "is of type 'image_url'" in error["message"]


# -- with a model that sees -------------------------------------------------------------------


@pytest.fixture
def seeing(serve: Start, media_folder: Callable[[str], Path]) -> Running:
    return serve({"model": str(media_folder("qwen2_5_vl"))})


@pytest.fixture
def hearing(serve: Start, media_folder: Callable[[str], Path]) -> Running:
    return serve({"model": str(media_folder("qwen2_audio"))})


def ask(running: Running, part: dict[str, Any], question: str = "What is it?") -> Any:
    parts = [{"type": "text", "text": question}, part]
    reply = running.chat("", messages=[{"role": "user", "content": parts}])
    running.llm.flush()
    return reply


def test_parts_that_a_model_cannot_take_are_named_as_they_were_sent(
    seeing: Running, hearing: Running
) -> None:
    for running, part in ((seeing, sound()), (hearing, plain("red"))):
        error = ask(running, part).json()["error"]
        assert error["param"] == "messages[0].content[1]"
        assert f"is of type '{part['type']}'" in error["message"]


def test_the_same_picture_is_reused_and_another_is_not(seeing: Running) -> None:
    first, second, third = (ask(seeing, plain(colour)) for colour in ("red", "red", "blue"))
    for reply in (first, second, third):
        assert reply.status_code == 200, reply.text
    told = [reply.json()["kvshare"] for reply in (first, second, third)]
    assert [t["media"][0]["source"] for t in told] == ["encoder", "kv", "encoder"]
    assert told[0]["media"][0]["content_hash"] == told[1]["media"][0]["content_hash"]
    assert told[0]["media"][0]["content_hash"] != told[2]["media"][0]["content_hash"]
    image = told[2]["media"][0]
    assert told[2]["exact"] <= image["start"]
    assert second.json()["choices"] == first.json()["choices"]


def test_a_video_is_reused_by_its_frames(seeing: Running) -> None:
    frames = film(6)
    replies = [
        ask(seeing, video(*shown, fps=2))
        for shown in (frames, frames[2:], [*frames[:4], frames[0]])
    ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
    told = [[use["source"] for use in r.json()["kvshare"]["media"]] for r in replies]
    assert told == [["encoder"] * 3, ["kv", "kv"], ["kv", "kv", "encoder"]]
    first, second, _ = (reply.json() for reply in replies)
    assert first["usage"]["prompt_tokens"] - second["usage"]["prompt_tokens"] == 12
    labels = [use["label"] for use in second["kvshare"]["media"]]
    assert labels == [f"video {i} of 2, 112x84, seen as 112x84" for i in (1, 2)]


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        (video(*film(1), *film(1, 56, 56)), "video_url[1]", "the first frame 112x84"),
        (video(*film(2), fps=0), "fps", "must be a number from"),
        (
            {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,YQ=="}},
            "video_url[0]",
            "no picture",
        ),
        (
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,YQ=="}},
            "video_url",
            "send frames",
        ),
    ],
)
def test_bad_video_is_refused_where_it_was_sent(
    seeing: Running, part: dict[str, Any], param: str, words: str
) -> None:
    reply = ask(seeing, part)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == f"messages[0].content[1].{param}"
    assert words in reply.json()["error"]["message"]


def test_pictures_to_responses_are_those_of_a_chat(seeing: Running) -> None:
    first = ask(seeing, plain("red")).json()
    for colour, is_same in (("red", True), ("blue", False)):
        picture = {"type": "input_image", "image_url": plain(colour)["image_url"]["url"]}
        parts = [{"type": "input_text", "text": "What is it?"}, picture]
        body = {"input": [{"role": "user", "content": parts}], "max_output_tokens": 4}
        reply = seeing.ask("POST", "/v1/responses", json={**body, "temperature": 0}).json()
        [medium] = reply["kvshare"]["media"]
        assert medium["source"] == ("kv" if is_same else "encoder")
        text = reply["output"][0]["content"][0]["text"]
        assert text == first["choices"][0]["message"]["content"] or not is_same


def test_pictures_to_responses_are_refused_as_they_were_sent(shared: Running) -> None:
    picture = {"type": "input_image", "image_url": plain("red")["image_url"]["url"]}
    result = {"type": "function_call_output", "call_id": "x", "output": [picture]}
    reply = shared.ask("POST", "/v1/responses", json={"input": [result]})
    assert reply.json()["error"]["param"] == "input[0].output[0]"
    assert "is of type 'input_image'" in reply.json()["error"]["message"]
