"""The Python API on a tiny model: what it takes, what it refuses, and what it survives."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvshare_mm import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    KVShare,
    KVShareConfig,
    ModelLoadError,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    StoreError,
    StreamChunk,
)
from kvshare_mm.errors import KVUnavailableError

OpenLLM = Callable[..., KVShare]

PATIENCE_S = 60
_PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(12))
_DONOR = f"Laboratory report. Patient number 48210. {_ROWS} Question: what is value 3?"
_TARGET = f"Laboratory report. Patient number 77. {_ROWS} Question: what is value 3?"
_CHAT = [
    {"role": "system", "content": "Answer with the number."},
    {"role": "user", "content": "What is the value?"},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[KVShare]:
    """For tests that change nothing about the server."""
    with KVShare(str(tiny_folder), embedder=None) as llm:
        yield llm


@pytest.fixture(scope="module")
def full(llm: KVShare) -> RequestOutput:
    """The answer to `_TARGET` without any cache."""
    return llm.generate(_TARGET, _PARAMS, RequestOptions(sharing="off"))


def events(llm: KVShare) -> dict[str, int]:
    counts: dict[str, int] = llm.stats()["donors"]["events"]
    return counts


# -- what it takes ------------------------------------------------------------------------------


def test_prompts_as_text_and_as_token_ids(llm: KVShare) -> None:
    ids = llm.tokenizer(_DONOR)["input_ids"]
    text = llm.generate(_DONOR, _PARAMS)
    assert isinstance(text, RequestOutput)
    assert text.prompt_token_ids == tuple(ids)
    for prompt in (ids, tuple(ids)):
        assert llm.generate(prompt, _PARAMS).token_ids == text.token_ids


def test_lists_of_prompts(llm: KVShare) -> None:
    prompts = ["The fox.", "The lazy dog.", "The number."]
    outputs = llm.generate(prompts, _PARAMS)
    assert isinstance(outputs, list)
    ids = [llm.tokenizer(p)["input_ids"] for p in prompts]
    assert [o.prompt_token_ids for o in outputs] == [tuple(i) for i in ids]
    assert [o.token_ids for o in llm.generate(ids, _PARAMS)] == [o.token_ids for o in outputs]
    assert [llm.generate(p, _PARAMS).token_ids for p in prompts] == [o.token_ids for o in outputs]
    assert llm.generate([], _PARAMS) == []
    [single] = llm.generate(prompts[:1], _PARAMS)
    assert single.token_ids == outputs[0].token_ids


def test_chat_goes_through_the_template(llm: KVShare) -> None:
    output = llm.chat(_CHAT, _PARAMS)
    text = (
        "<|im_start|>system\nAnswer with the number.<|im_end|>\n"
        "<|im_start|>user\nWhat is the value?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert llm.tokenizer.decode(output.prompt_token_ids) == text
    assert output.token_ids == llm.generate(text, _PARAMS).token_ids


def test_chat_takes_content_as_parts(llm: KVShare) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the value?"}]
    output = llm.chat([_CHAT[0], {"role": "user", "content": parts}], _PARAMS)
    assert output.prompt_token_ids == llm.chat(_CHAT, _PARAMS).prompt_token_ids


def test_streams_of_prompts_and_chats(llm: KVShare) -> None:
    ids = llm.tokenizer(_DONOR)["input_ids"]
    for prompt, output in (
        (_DONOR, llm.generate(_DONOR, _PARAMS)),
        (ids, llm.generate(_DONOR, _PARAMS)),
        (_CHAT, llm.chat(_CHAT, _PARAMS)),
    ):
        chunks = list(llm.stream(prompt, _PARAMS))
        assert "".join(c.text for c in chunks) == output.text
        assert chunks[-1].output is not None
        assert chunks[-1].output.token_ids == output.token_ids


def test_async_twins(llm: KVShare) -> None:
    async def ask() -> tuple[RequestOutput, RequestOutput, list[StreamChunk], list[StreamChunk]]:
        return (
            await llm.agenerate(_DONOR, _PARAMS),
            await llm.achat(_CHAT, _PARAMS),
            [c async for c in llm.astream(_DONOR, _PARAMS)],
            [c async for c in llm.astream(_CHAT, _PARAMS)],
        )

    generated, chatted, chunks, chat_chunks = asyncio.run(ask())
    assert generated.token_ids == llm.generate(_DONOR, _PARAMS).token_ids
    assert chatted.token_ids == llm.chat(_CHAT, _PARAMS).token_ids
    assert "".join(c.text for c in chunks) == generated.text
    assert "".join(c.text for c in chat_chunks) == chatted.text


def test_outputs_and_stats_are_json(open_llm: OpenLLM, tmp_path: Path) -> None:
    llm = open_llm(store_dir=tmp_path / "store")
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush()
    output = llm.generate(_TARGET, SamplingParams(max_tokens=6, logprobs=2))
    assert llm.flush()
    told = json.loads(json.dumps(output.to_dict()))
    assert told["provenance"]["reused"] == output.provenance.reused > 0
    assert len(told["logprobs"]) == len(told["token_ids"]) == 6
    stats = json.loads(json.dumps(llm.stats()))
    assert set(stats) == {"model", "dtype", "unsupported", "requests", "queue", "donors"}
    assert stats["dtype"] == "float32"
    assert stats["unsupported"] is None
    assert stats["queue"] == {"waiting": 0, "running": 0}
    assert stats["requests"]["requests"] == 2
    assert set(stats["donors"]) == {"nodes", "tokens_owned", "tokens_whole", "bytes", "events"}
    assert stats["donors"]["nodes"] == 2
    assert 0 < stats["donors"]["tokens_owned"] < stats["donors"]["tokens_whole"]
    assert set(stats["donors"]["bytes"]) == {"host", "disk"}
    assert all(n > 0 for n in stats["donors"]["bytes"].values())
    assert stats["donors"]["events"]["captured"] == 2


def test_the_context_manager_closes(tiny_folder: Path) -> None:
    with KVShare(str(tiny_folder), embedder=None) as llm:
        llm.generate("The fox.", _PARAMS)
    with pytest.raises(EngineClosedError):
        llm.generate("The fox.", _PARAMS)
    assert llm.stats()["requests"]["requests"] == 1
    assert llm.flush(1)
    with (
        pytest.raises(ZeroDivisionError),
        KVShare(str(tiny_folder), embedder=None) as other,
    ):
        raise ZeroDivisionError
    with pytest.raises(EngineClosedError):
        other.generate("The fox.", _PARAMS)


# -- requests that cannot be served -------------------------------------------------------------

_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def user(content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ([[]], "empty"),
        (["The fox.", ""], "empty"),
        ([5, 379], "0..378"),
        ([-1], "0..378"),
        ([[5], [5, 10**9]], "0..378"),
        ([True, False], "text or a list of token ids"),
        ([5, "The fox."], "text or a list of token ids"),
        (["The fox.", 5], "text or a list of token ids"),
        ([5, 6.0], "text or a list of token ids"),
        (b"The fox.", "text or a list of token ids"),
        (5, "token ids"),
        (None, "token ids"),
        ({"prompt": "The fox."}, "token ids"),
        (np.array([5, 6]), "token ids"),
        ("half a \ud83d face", "surrogate"),
        ("a b " * 300, "context holds 512"),
        (["The fox.", "a b " * 300], "context holds 512"),
        ([5] * 512, "context holds 512"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_prompts_that_are_refused(llm: KVShare, prompt: Any, message: str) -> None:
    before = llm.stats()["requests"]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(prompt, _PARAMS)
    assert caught.value.field == "prompt"
    if not isinstance(prompt, list):
        # At the call, not at the first chunk.
        for call in (llm.stream, llm.astream):
            with pytest.raises(InvalidRequestError):
                call(prompt, _PARAMS)
        with pytest.raises(InvalidRequestError):
            asyncio.run(llm.agenerate(prompt, _PARAMS))
    assert llm.stats()["requests"] == before


@pytest.mark.parametrize(
    ("messages", "field", "message"),
    [
        ([], "messages", "at least one message"),
        (None, "messages", "at least one message"),
        ("Hello", "messages", "at least one message"),
        (user("Hello")[0], "messages", "at least one message"),
        (user(""), "messages", "empty"),
        (user("  "), "messages", "empty"),
        (["Hello"], "messages[0]", "needs a role"),
        ([{"content": "Hello"}], "messages[0]", "needs a role"),
        ([{"role": 7, "content": "Hello"}], "messages[0]", "needs a role"),
        ([{"role": "user"}], "messages[0]", "content must be"),
        (user(None), "messages[0]", "content must be"),
        (user(7), "messages[0]", "content must be"),
        (user([]), "messages[0]", "content must be"),
        ([*_CHAT, *user(None)], "messages[2]", "content must be"),
        (user([_IMAGE]), "messages[0].content[0]", "'image_url'.*takes parts of type text"),
        (user([{"type": "text", "text": "See"}, _IMAGE]), "messages[0].content[1]", "'image_url'"),
        (user([{"type": "input_audio"}]), "messages[0].content[0]", "'input_audio'"),
        (user([{"type": "text"}]), "messages[0].content[0]", "without text"),
        (user(["Hello"]), "messages[0].content[0]", "object with a type"),
        (user("half a \ud83d face"), "messages", "surrogate"),
        (user("a b " * 300), "prompt", "context holds 512"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_messages_that_are_refused(llm: KVShare, messages: Any, field: str, message: str) -> None:
    before = llm.stats()["requests"]
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.chat(messages, _PARAMS)
    assert caught.value.field == field
    with pytest.raises(InvalidRequestError):
        asyncio.run(llm.achat(messages, _PARAMS))
    assert llm.stats()["requests"] == before


def test_a_template_that_refuses_is_the_requests_fault(open_llm: OpenLLM) -> None:
    llm = open_llm()
    llm.tokenizer.chat_template = "{{ raise_exception('only user and assistant take turns') }}"
    with pytest.raises(InvalidRequestError, match="take turns"):
        llm.chat(_CHAT)
    llm.tokenizer.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        llm.chat(_CHAT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "many"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", 2),
        ("seed", "abc"),
        ("seed", 1 << 64),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", 7),
        ("ignore_eos", "yes"),
        ("logprobs", -1),
        ("logprobs", 10_000),
    ],
)
def test_sampling_values_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sharing", "sometimes"),
        ("sharing", True),
        ("repair", "magic"),
        ("repair", "window:-1"),
        ("repair", ""),
        ("repair", 8),
        ("max_divergence", -0.1),
        ("max_divergence", float("nan")),
        ("max_divergence", "small"),
        ("cache_salt", 7),
        ("store", None),
    ],
)
def test_request_options_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        RequestOptions(**{field: value})
    assert caught.value.field == field


def test_a_store_in_the_home_folder() -> None:
    assert KVShareConfig.of(store_dir="~/donors").store_dir == Path.home() / "donors"


def test_two_policies_for_one_request_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="one of the two"):
        RequestOptions(repair="window:3", max_divergence=0.1)


def test_a_request_says_how_far_it_may_diverge(open_llm: OpenLLM) -> None:
    llm = open_llm(repair="none")
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush(30)
    loose, strict = (
        llm.generate(_TARGET, _PARAMS, RequestOptions(max_divergence=kl, store=False)).provenance
        for kl in (1e6, 0.0)
    )
    assert loose.reused > 0
    assert strict.reused == 0
    assert strict.declined == "divergence"


def test_options_of_the_wrong_kind_do_not_reach_the_engine(llm: KVShare) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("The fox.", {"max_tokens": 3}),  # type: ignore[call-overload]
        lambda: llm.generate("The fox.", _PARAMS, {"sharing": "off"}),  # type: ignore[call-overload]
        lambda: llm.chat(_CHAT, RequestOptions()),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(InvalidRequestError, match="SamplingParams"):
            call()
    assert len(llm.generate("The fox.", _PARAMS).token_ids) == 6


# -- servers that cannot be made ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": True}, "speculative"),
        ({"Sharing": "on"}, "Sharing"),
        ({"sharing": "yes"}, "sharing"),
        ({"repair": "magic:3"}, "repair.*magic"),
        ({"repair": "window:x"}, "repair"),
        ({"max_divergence": -1}, "max_divergence"),
        ({"max_divergence": 0.1, "repair": "window:3"}, "one of the two"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"max_queue": 0}, "max_queue"),
        ({"max_model_len": 3}, "max_model_len"),
        ({"min_gain_share": 1.5}, "min_gain_share"),
        ({"host_bytes": -1}, "host_bytes"),
        ({"dtype": "int3"}, "dtype"),
        ({"engine": "warp"}, "engine"),
        ({"cache_salt": 7}, "cache_salt"),
        ({"index_uri": "milvus.txt"}, "index_uri"),
        ({"max_queue": 0, "min_run": 0}, "max_queue.*min_run"),
    ],
    ids=str,
)
def test_options_that_are_refused_before_a_model_is_loaded(
    tiny_folder: Path,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvshare_mm.assemble.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        KVShare(str(tiny_folder), **{"embedder": None, **options})


@pytest.mark.parametrize("below", ["file", "proc"])
def test_a_store_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "store" if below == "file" else Path("/proc/kvshare")
    monkeypatch.setattr("kvshare_mm.assemble.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(StoreError, match=str(folder)):
        KVShare(str(tiny_folder), embedder=None, store_dir=folder)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    for name, message in (
        (str(tmp_path / "nowhere"), "no model folder"),
        ("./nowhere", "no model folder"),
        (str(tmp_path / "nowhere.gguf"), "no GGUF file"),
        ("no-such-model-anywhere", "neither a folder nor an embedded model"),
        (str(tmp_path), "Could not load"),  # a folder, but empty
    ):
        with pytest.raises(ModelLoadError, match=message):
            KVShare(name, embedder=None)
    with pytest.raises(ConfigError, match="model"):
        KVShare(7)  # type: ignore[arg-type]


def test_devices_and_lengths_that_do_not_exist(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="abacus"):
        KVShare(str(tiny_folder), embedder=None, device="abacus")
    with pytest.raises(ConfigError, match=r"max_model_len=513.*512"):
        KVShare(str(tiny_folder), embedder=None, max_model_len=513)


def test_a_failed_start_leaves_no_threads(tiny_folder: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError):
        KVShare(str(tiny_folder), embedder=None, store_dir=tmp_path, max_model_len=513)
    with pytest.raises(ModelLoadError):
        KVShare(str(tmp_path / "nowhere"), store_dir=tmp_path)
    assert set(threading.enumerate()) == before


# -- restarts -----------------------------------------------------------------------------------


def test_a_reopened_store_serves_reuse(
    open_llm: OpenLLM, full: RequestOutput, tmp_path: Path
) -> None:
    first = open_llm(store_dir=tmp_path, repair="auto:0.0001")
    first.generate(_DONOR, _PARAMS)
    first.close()  # without a flush
    second = open_llm(store_dir=str(tmp_path), repair="window:2")
    assert events(second)["restored"] == 1
    output = second.generate(_TARGET, _PARAMS)
    assert output.provenance.reused > len(output.prompt_token_ids) // 2
    assert output.provenance.fallback is None
    again = second.generate(_DONOR, _PARAMS)
    assert again.provenance.recomputed == 1
    second.close()
    third = open_llm(store_dir=tmp_path)
    assert events(third)["restored"] == 2  # the second was edited from the first
    repeated = third.generate(_TARGET, _PARAMS)
    assert repeated.provenance.recomputed < full.provenance.recomputed


def test_reuse_from_disk_is_reuse_from_memory(open_llm: OpenLLM, tmp_path: Path) -> None:
    first = open_llm(store_dir=tmp_path)
    first.generate(_DONOR, _PARAMS)
    first.flush()
    options = RequestOptions(store=False)
    memory = first.generate(_TARGET, SamplingParams(max_tokens=6, logprobs=3), options)
    first.close()
    second = open_llm(store_dir=tmp_path)
    disk = second.generate(_TARGET, SamplingParams(max_tokens=6, logprobs=3), options)
    assert disk.provenance == memory.provenance
    assert disk.token_ids == memory.token_ids
    assert disk.logprobs == memory.logprobs


def test_salts_hold_over_a_restart(open_llm: OpenLLM, tmp_path: Path) -> None:
    first = open_llm(store_dir=tmp_path, cache_salt="a")
    first.generate(_DONOR, _PARAMS)
    first.close()
    second = open_llm(store_dir=tmp_path, cache_salt="b")
    assert second.generate(_TARGET, _PARAMS).provenance.declined == "no_donor"
    options = RequestOptions(cache_salt="a")
    assert second.generate(_TARGET, _PARAMS, options).provenance.reused > 0


def test_another_models_donors_are_left_alone(
    open_llm: OpenLLM, tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    first = open_llm(store_dir=tmp_path / "store")
    first.generate(_DONOR, _PARAMS)
    first.close()
    with KVShare(str(other), embedder=None, store_dir=tmp_path / "store") as second:
        assert "restored" not in events(second)
        assert second.generate(_TARGET, _PARAMS).provenance.declined == "no_donor"
    third = open_llm(store_dir=tmp_path / "store")
    assert events(third)["restored"] == 1


_KILLED = """
import sys, time
import torch
from kvshare_mm import KVShare, SamplingParams
torch.set_num_threads(1)
llm = KVShare(sys.argv[1], embedder=None, store_dir=sys.argv[2])
llm.generate(sys.argv[3], SamplingParams(max_tokens=6, ignore_eos=True))
print("flushed" if llm.flush() else "not flushed", flush=True)
time.sleep(600)
"""


def test_what_was_flushed_survives_kill_9(
    open_llm: OpenLLM, tiny_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _KILLED, str(tiny_folder), str(tmp_path), _DONOR]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "flushed\n"
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    llm = open_llm(store_dir=tmp_path)
    assert events(llm)["restored"] == 1
    output = llm.generate(_TARGET, _PARAMS)
    assert output.provenance.reused > 0
    assert output.provenance.fallback is None


# -- cache problems: served in full, and counted ------------------------------------------------


@pytest.fixture
def store(open_llm: OpenLLM, tmp_path: Path) -> Path:
    """A store folder that holds `_DONOR`."""
    llm = open_llm(store_dir=tmp_path / "store")
    llm.generate(_DONOR, _PARAMS)
    llm.close()
    return tmp_path / "store"


def node_file(store: Path) -> Path:
    [path] = (store / "kv").iterdir()
    return path


def test_flipped_bytes_in_stored_kv(open_llm: OpenLLM, full: RequestOutput, store: Path) -> None:
    path = node_file(store)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0x40
    path.write_bytes(content)
    llm = open_llm(store_dir=store)
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.fallback == "corrupt"
    assert output.provenance.recomputed == len(output.prompt_token_ids)
    assert output.provenance.donors == ()
    assert events(llm)["read_corrupt"] == 1
    assert events(llm)["forgotten"] == 1
    assert llm.stats()["requests"]["fallback_corrupt"] == 1
    assert llm.flush()
    # The damaged donor is gone, and the request that met it has taken its place.
    assert llm.stats()["donors"]["nodes"] == 1
    again = llm.generate(_TARGET, _PARAMS)
    assert again.provenance.recomputed == 1
    assert again.token_ids == full.token_ids


@pytest.mark.parametrize("damage", ["header", "truncated", "empty", "another format"])
def test_files_that_are_damaged_at_the_start(
    open_llm: OpenLLM, full: RequestOutput, store: Path, damage: str
) -> None:
    path = node_file(store)
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[200] ^= 0x40
    path.write_bytes(
        {
            "truncated": bytes(content[:-100]),
            "empty": b"",
            "another format": b"{}" * 500,
        }.get(damage, bytes(content))
    )
    llm = open_llm(store_dir=store)
    assert events(llm) == {"damaged_at_start": 1}
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.declined == "no_donor"


def test_files_that_vanish(open_llm: OpenLLM, full: RequestOutput, store: Path) -> None:
    llm = open_llm(store_dir=store)
    node_file(store).unlink()
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.fallback == "evicted"
    assert llm.stats()["requests"]["fallback_evicted"] == 1


def test_a_full_disk_costs_durability_only(
    open_llm: OpenLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: Any, **kwargs: Any) -> int:
        raise KVUnavailableError("io_error", "No space left on device")

    llm = open_llm(store_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("kvshare_mm.store.disk.write_node", no_space)
        llm.generate(_DONOR, _PARAMS)
        assert not llm.flush()
        assert events(llm)["write_io_error"] == 1
        assert llm.generate(_TARGET, _PARAMS).provenance.reused > 0  # from memory
        llm.flush()
    llm.generate("The quick brown fox jumps. " * 9, _PARAMS)  # there is space again
    assert llm.flush()
    llm.close()
    assert events(open_llm(store_dir=tmp_path))["restored"] == 1


def test_a_lookup_that_raises(open_llm: OpenLLM, full: RequestOutput) -> None:
    llm = open_llm()
    llm.generate(_DONOR, _PARAMS)
    llm.flush()
    assert llm._parts.donors is not None

    def broken(*args: Any) -> None:
        raise RuntimeError("a bug in an index")

    llm._parts.donors.find = broken  # type: ignore[assignment, method-assign]
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.fallback == output.provenance.declined == "lookup_error"
    assert output.provenance.recomputed == len(output.prompt_token_ids)
    assert events(llm)["lookup_error"] == 1
    assert llm.stats()["requests"]["fallback_lookup_error"] == 1


def test_an_edit_that_raises(open_llm: OpenLLM, full: RequestOutput) -> None:
    llm = open_llm()
    llm.generate(_DONOR, _PARAMS)
    llm.flush()
    assert llm._parts.donors is not None

    def broken(*args: Any) -> None:
        raise MemoryError

    llm._parts.donors.read = broken  # type: ignore[assignment, method-assign]
    output = llm.generate(_TARGET, _PARAMS)
    assert output.token_ids == full.token_ids
    assert output.provenance.fallback == "edit_error"
    assert llm.stats()["requests"]["fallback_edit_error"] == 1


def test_more_donors_than_memory(open_llm: OpenLLM) -> None:
    llm = open_llm(host_bytes=1 << 20)
    numbers = np.random.default_rng(0).integers(3, 379, (14, 200))
    for ids in numbers.tolist():
        assert len(llm.generate(ids, _PARAMS).token_ids) == 6
    assert llm.flush()
    donors = llm.stats()["donors"]
    assert 0 < donors["nodes"] < 14
    assert donors["bytes"]["host"] <= 1 << 20
    assert donors["events"]["forgotten"] == 14 - donors["nodes"]
    newest = llm.generate(numbers[-1].tolist(), _PARAMS)
    assert newest.provenance.recomputed == 1
    oldest = llm.generate(numbers[0].tolist(), _PARAMS)
    assert oldest.provenance.declined == "no_donor"


# -- dense search -------------------------------------------------------------------------------


class StubEmbedder:
    """Letters counted. Raises for prompts about a yak."""

    dim = 8

    def __init__(self, name: str) -> None:
        if name == "missing":
            raise ModelLoadError("there is no such embedder")
        self.name = name

    def embed(self, texts: list[str]) -> np.ndarray:
        if any("yak" in text for text in texts):
            raise RuntimeError("this embedder fears yaks")
        counts = np.array([[1 + t.count(c) for c in "aeinorst"] for t in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def stub_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare_mm.modalities.embed.TextEmbedder", StubEmbedder)


@pytest.mark.usefixtures("stub_embedder")
def test_milvus_that_cannot_be_reached(open_llm: OpenLLM, full: RequestOutput) -> None:
    llm = open_llm(embedder="stub", index_uri="http://127.0.0.1:1", max_num_seqs=1)
    assert llm.generate(_TARGET, _PARAMS).token_ids == full.token_ids
    assert llm.flush()
    assert llm.generate(_DONOR, _PARAMS).provenance.reused > 0
    llm.generate(["The fox.", "The dog.", "The number."], _PARAMS)
    assert llm.flush()
    assert events(llm)["dense_open_failed"] == 1
    assert events(llm)["dense_insert_skipped"] >= 2


@pytest.mark.usefixtures("stub_embedder")
def test_an_embedder_that_is_missing(open_llm: OpenLLM) -> None:
    llm = open_llm(embedder="missing")
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush()
    assert llm.generate(_TARGET, _PARAMS).provenance.reused > 0
    assert events(llm)["dense_open_failed"] == 1


@pytest.mark.usefixtures("stub_embedder")
def test_donors_are_in_the_dense_index_and_back_after_a_restart(
    open_llm: OpenLLM, tmp_path: Path
) -> None:
    options = {"embedder": "stub", "store_dir": tmp_path, "max_num_seqs": 1}

    def dense_ids(llm: KVShare) -> set[str]:
        assert llm._parts.donors is not None
        semantic: Any = llm._parts.donors._semantic
        ids: set[str] = semantic._opened[0].ids()
        return ids

    llm = open_llm(**options)
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush()
    # A prompt that cannot be embedded is served and stored like the others.
    yak = "The yak jumps over the lazy dog. " * 4
    llm.generate([yak, "The quick brown fox jumps over the lazy dog. " * 4], _PARAMS)
    assert llm.flush()
    donors = llm._parts.donors
    assert donors is not None
    nodes = {node.node_id for node in donors.tree}
    ids = dense_ids(llm)
    assert ids < nodes
    assert (len(nodes), len(ids)) == (3, 2)
    assert events(llm)["dense_insert_failed"] == 1
    namespace = next(iter(donors.tree)).namespace
    assert set(donors.similar(_TARGET, namespace)) == ids
    assert donors.similar(yak, namespace) == ()
    assert events(llm)["dense_search_failed"] == 1
    llm.close()

    # The index may be lost: it is filled again from the store.
    shutil.rmtree(next(tmp_path.glob("milvus-*.db")), ignore_errors=True)
    for path in tmp_path.glob("milvus-*.db"):
        os.unlink(path)
    again = open_llm(**options)
    assert again.flush()
    assert dense_ids(again) == ids
