"""vLLM's start on a machine that others use, and what is summary when it fails. Needs no vLLM."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ModelLoadError
from kvshare_mm.vllm import compat, failures, plugin, room
from kvshare_mm.vllm.offline import VLLMEngine

GIB = 1 << 30
CAUSE = "Available memory on node 0 (17.2/23.0 GiB) is less than desired CPU memory utilization"


@pytest.mark.parametrize("free", [1, 3, 8, 17, 20, 23])
@pytest.mark.parametrize("donors", [0, 1, 4, 100])
def test_what_vllm_asks_for_is_there(free: int, donors: int) -> None:
    share = room.share_of_memory(23 * GIB, free * GIB, donors * GIB)
    assert 0 < share * 23 <= 0.9 * free  # vLLM refuses to start where it is more than free
    assert share * 23 >= 0.9 * min(free / 2, 0.9 * free) - 0.1


def test_stored_requests_have_their_room_beside_it() -> None:
    assert room.share_of_memory(100, 80, 0) == 0.72
    assert room.share_of_memory(100, 80, 20) == 0.52
    assert room.share_of_memory(100, 80, 70) == 0.4
    assert room.share_of_memory(100, 80, 0, workers=2) == 0.36


def test_an_engine_gets_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = KVShareConfig.of(engine="vllm", host_bytes=2 * GIB)
    monkeypatch.setattr(compat, "cpu_memory", lambda: (23 * GIB, 17 * GIB))
    assert room.fitted({"model": "m"}, config) == {"model": "m", "gpu_memory_utilization": 0.578}
    off = KVShareConfig.of(engine="vllm", reuse="off")
    assert room.fitted({}, off) == {"gpu_memory_utilization": 0.665}


@pytest.mark.parametrize(
    "chosen", [{"gpu_memory_utilization": 0.3}, {"kv_cache_memory_bytes": 1 << 30}]
)
def test_what_was_chosen_stays(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any]) -> None:
    monkeypatch.setattr(compat, "cpu_memory", lambda: (23 * GIB, 17 * GIB))
    assert room.fitted(dict(chosen), KVShareConfig.of(engine="vllm")) == chosen


def test_a_gpu_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "cpu_memory", lambda: None)
    assert room.fitted({}, KVShareConfig.of(engine="vllm")) == {}


def _core(words: str) -> NoReturn:
    """Stands for vLLM's engine core: loads plugins, fails, logs what and ends."""
    plugin.register()
    plugin.register()
    logger = logging.getLogger("vllm.v1.engine.core")
    try:
        try:
            raise ValueError(words)
        except ValueError:
            logger.exception("WorkerProc failed to start.")
            raise RuntimeError("WorkerProc initialization failed") from None
    except RuntimeError:
        logger.exception("EngineCore failed to start.")
    sys.exit(3)


class _Args:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


class _LLM:
    @staticmethod
    def from_engine_args(args: _Args) -> Any:
        words = args.arguments["words"]
        if words:
            way = multiprocessing.get_context(args.arguments["way"])
            core = way.Process(target=_core, args=(words,))
            core.start()
            core.join()
            assert core.exitcode == 3
        raise RuntimeError("Engine core initialization failed. See root cause above.")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that never starts."""
    made = {name: types.ModuleType(name) for name in ("vllm", "vllm.v1", "vllm.v1.engine")}
    last = types.ModuleType("vllm.v1.engine.async_llm")
    made["vllm"].AsyncEngineArgs = _Args  # type: ignore[attr-defined]
    last.AsyncLLM = _LLM  # type: ignore[attr-defined]
    for name, module in {**made, last.__name__: last}.items():
        monkeypatch.setitem(sys.modules, name, module)


# Where vLLM is installed, what is forked would import the rest of it from the fake.
_WAYS = ["spawn"] if importlib.util.find_spec("vllm") else ["spawn", "fork"]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("way", _WAYS)
def test_the_process_that_failed_says_why(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where another process finds `_core`
    with pytest.raises(ModelLoadError) as summary:
        VLLMEngine({"words": CAUSE, "way": way})
    assert str(summary.value) == f"vLLM could not start with this model: ValueError: {CAUSE}"


@pytest.mark.usefixtures("fake")
def test_without_a_word_from_it_vllms_own_stands() -> None:
    with pytest.raises(ModelLoadError, match="Engine core initialization failed"):
        VLLMEngine({"words": ""})


def test_nothing_is_noted_once_the_start_is_over() -> None:
    with failures.noted() as first:
        name = os.environ[failures.VARIABLE]
        assert first() is None
        failures.note(name)
    assert failures.VARIABLE not in os.environ
    late = failures._Notes(Path(name))
    record = logging.LogRecord(
        "vllm", logging.ERROR, "", 0, "", (), (ValueError, ValueError(), None)
    )
    late.emit(record)
    assert not os.path.exists(name)
    failures.note(None)
    assert not any(isinstance(h, failures._Notes) for h in logging.getLogger("vllm").handlers)
