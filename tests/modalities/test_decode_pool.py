"""Decoding in other processes: the same results, and whatever happens there stays there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessor, WhisperFeatureExtractor

from kvshare_mm.errors import EngineClosedError, InvalidRequestError
from kvshare_mm.modalities import decode_pool
from kvshare_mm.modalities.audio import AudioAdapter
from kvshare_mm.modalities.decode_pool import DecodePool
from kvshare_mm.modalities.decoding import QUICK_S, Asker, asker
from kvshare_mm.modalities.framing import receive
from kvshare_mm.modalities.image import ImageAdapter
from kvshare_mm.modalities.picture_file import load_picture
from kvshare_mm.modalities.sound_file import load_sound
from kvshare_mm.modalities.sources import MediaSources

from ..helpers import until
from . import hostile
from .media import encoded, picture, recorded, tone

WHERE = "messages[0].content[0].image"
MAX_PIXELS = 1_000_000
_PNG = encoded(picture())
_TURNED = Image.Exif()
_TURNED[0x112] = 6


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    made = DecodePool(1, 30.0, MAX_PIXELS)
    yield made
    made.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., DecodePool]]:
    pools: list[DecodePool] = []

    def make(deadline_s: float = 30.0, **options: Any) -> DecodePool:
        pools.append(DecodePool(1, deadline_s, MAX_PIXELS, **options))
        assert load(pools[-1]) is not None  # it runs
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def load(pool: DecodePool, content: bytes = _PNG) -> Image.Image:
    return pool.picture(content, WHERE, MAX_PIXELS).image


def process_of(pool: DecodePool) -> psutil.Process:
    [worker] = pool._all
    assert worker._process is not None
    return psutil.Process(worker._process.pid)


def is_asked(pool: DecodePool) -> Callable[[], bool]:
    """Whether its process has been asked for a file since: one that ends before is replaced."""
    [worker] = pool._all
    before = worker.deadline
    return lambda: worker.deadline > before


def told(decode: Callable[..., Any], *asked: Any) -> Any:
    """What is decoded, or why it is refused."""
    try:
        return decode(*asked)
    except InvalidRequestError as error:
        return error


PICTURES = {
    "png": _PNG,
    "large": encoded(picture(900, 700), "JPEG"),
    "grey": encoded(picture(mode="L"), "PNG"),
    "palette": encoded(picture(mode="P"), "GIF"),
    "transparent": encoded(picture(700, 500).convert("RGBA").rotate(20, expand=True), "PNG"),
    "turned": encoded(picture(), "JPEG", exif=_TURNED),
    "16 bits": encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), "PNG"),
    "frames": hostile.gif(3),
    "none": b"no picture",
    "torn": _PNG[:200],
    "scans": hostile.jpeg_of_scans(100),
    "too large": hostile.png(width=3000, height=3000),
}  # fmt: skip
SOUNDS = {
    "wav": recorded(tone()),
    "stereo": recorded(np.stack([tone(), tone(hertz=300)], axis=1), 44_100, "FLAC"),
    "mp3": recorded(tone(), format="MP3"),
    "none": b"no sound",
    "long": recorded(np.zeros(31 * 16_000, np.float32)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_decoded_here(pool: DecodePool, name: str) -> None:
    asked = (PICTURES[name], WHERE, MAX_PIXELS)
    want = told(load_picture, *asked)
    got = told(pool.picture, *asked)
    if isinstance(want, InvalidRequestError):
        assert (str(got), got.field) == (str(want), want.field)
        return
    assert (got.image.mode, got.image.size) == ("RGB", want.image.size)
    assert got.image.tobytes() == want.image.tobytes()
    assert got.notes == want.notes
    assert got.cpu_s > 0


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_are_those_decoded_here(pool: DecodePool, name: str) -> None:
    asked = (SOUNDS[name], WHERE, 16_000, 30.0)
    want = told(load_sound, *asked)
    got = told(pool.sound, *asked)
    if isinstance(want, InvalidRequestError):
        assert (str(got), got.field) == (str(want), want.field)
        return
    assert got.samples.dtype == want.samples.dtype
    assert np.array_equal(got.samples, want.samples)
    assert (got.rate, got.channels) == (want.rate, want.channels)


def test_digests_do_not_depend_on_where_media_are_decoded(
    pool: DecodePool, image_processor: Qwen2VLImageProcessor, extractor: WhisperFeatureExtractor
) -> None:
    image, audio = {"type": "image", "image": _PNG}, {"type": "audio", "audio": SOUNDS["wav"]}
    digests = {
        (
            ImageAdapter(image_processor, MediaSources(), MAX_PIXELS, decoder)
            .read(image, "x", "")
            .digest,
            AudioAdapter(extractor, MediaSources(), decoder).read(audio, "x", "").digest,
        )
        for decoder in (None, pool)
    }
    assert len(digests) == 1


@pytest.mark.parametrize(("quick_s", "times"), [(QUICK_S, 1), (0.0, 3)], ids=["quick", "slow"])
def test_what_was_seen_is_decoded_again_only_if_it_took_long(
    pool: DecodePool,
    image_processor: Qwen2VLImageProcessor,
    monkeypatch: pytest.MonkeyPatch,
    quick_s: float,
    times: int,
) -> None:
    monkeypatch.setattr("kvshare_mm.modalities.image.QUICK_S", quick_s)
    adapter = ImageAdapter(image_processor, MediaSources(), MAX_PIXELS, pool)
    before = pool.counters["decoded"]
    for _ in range(3):
        adapter.read({"type": "image", "image": _PNG}, "x", "")
    assert pool.counters["decoded"] == before + times


def test_a_process_that_dies_takes_one_file_with_it(opened: Callable[..., DecodePool]) -> None:
    pool = opened()
    [worker] = pool._all
    own = worker._socket  # without it its process would end by itself
    worker._socket, theirs = socket.socketpair()

    def die_of_it() -> None:
        with theirs:
            assert receive(theirs) and receive(theirs) == _PNG

    with ThreadPoolExecutor() as threads:
        dying = threads.submit(die_of_it)
        with pytest.raises(InvalidRequestError, match="ended the process"):
            load(pool)
        dying.result(30)
    assert own is not None
    own.close()
    assert load(pool).size == (80, 60)
    assert pool.counters["killed"] == 1


def test_one_that_died_while_it_had_nothing_to_do_is_replaced(
    opened: Callable[..., DecodePool],
) -> None:
    pool = opened()
    gone = process_of(pool)
    gone.kill()
    until(lambda: not gone.is_running() or gone.status() == psutil.STATUS_ZOMBIE)
    assert load(pool).size == (80, 60)


def test_one_that_is_ending_has_not_read_the_file(
    opened: Callable[..., DecodePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = opened()
    ending = process_of(pool)
    ending.suspend()
    send = decode_pool.send

    def sent_too_late(other: socket.socket, message: bytes) -> None:
        send(other, message)
        if message[:1] != b"{" and ending.is_running():
            ending.kill()

    monkeypatch.setattr(decode_pool, "send", sent_too_late)
    assert load(pool).size == (80, 60)
    assert pool.counters["killed"] == 0


def test_memory_has_a_ceiling(opened: Callable[..., DecodePool]) -> None:
    pool = opened(memory=200 << 20)
    content = encoded(Image.new("L", (9_000, 9_000)))
    with pytest.raises(InvalidRequestError, match="memory") as caught:
        pool.picture(content, WHERE, 100_000_000)
    assert caught.value.field == WHERE
    assert load(pool).size == (80, 60)


def test_who_goes_away_ends_the_work(opened: Callable[..., DecodePool]) -> None:
    pool = opened()
    hung = process_of(pool)
    hung.suspend()
    asks = is_asked(pool)
    waits = Asker()
    asker.set(waits)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(copy_context().run, load, pool)
        asker.set(None)
        until(lambda: waits._stop is not None and asks())
        waits.leave()
        with pytest.raises(InvalidRequestError):
            asked.result(30)
    assert not hung.is_running()
    assert pool.counters["killed"] == 0  # nothing was wrong with the file
    assert load(pool).size == (80, 60)


def test_who_went_away_before_gets_nothing_decoded(opened: Callable[..., DecodePool]) -> None:
    pool = opened()
    before = pool.counters["decoded"]
    waits = Asker()
    waits.leave()
    context = copy_context()
    context.run(asker.set, waits)
    with pytest.raises(InvalidRequestError, match="nobody waits"):
        context.run(load, pool)
    assert pool.counters["decoded"] == before


def test_closing_ends_what_runs(opened: Callable[..., DecodePool]) -> None:
    pool = opened()
    hung = process_of(pool)
    hung.suspend()
    asks = is_asked(pool)
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(load, pool) for _ in range(3)]  # one is served, two wait
        until(lambda: not pool._idle and asks())
        pool.close()
        assert [type(each.exception(30)) for each in asked] == [EngineClosedError] * 3
    assert not hung.is_running()


def test_processes_end_with_the_one_that_started_them() -> None:
    program = (
        "import os, signal\n"
        "from kvshare_mm.modalities.decode_pool import DecodePool\n"
        "pool = DecodePool(2, 30.0, 1000)\n"
        "[worker.ready() for worker in pool._all]\n"
        "print(*[worker._process.pid for worker in pool._all], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2 and os.getpid() not in pids
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_they_import_no_torch() -> None:
    """Which would take seconds and hundreds of megabytes, each."""
    program = (
        "import sys; import kvshare_mm.modalities.decode_worker; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "False"
