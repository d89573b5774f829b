"""vLLM engines for tests: one with KVShare in this process, one without it in a process beside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, get_kv_transfer_group
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import kvshare_mm
from kvshare_mm import KVShare, RequestOptions, RequestOutput
from kvshare_mm.chat import chat_stream
from kvshare_mm.config import KVShareConfig
from kvshare_mm.models.loader import load_tokenizer, locate
from kvshare_mm.stream import SegmentStream
from kvshare_mm.vllm import arguments, kv_transfer_config
from kvshare_mm.vllm.pictures import picture_support, prompt_of, tokens_written

# Token ids, or a prompt with pictures as vLLM takes it.
Prompt = Sequence[int] | dict[str, Any]

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True)
class Shared:
    """An engine with KVShare whose scheduler and worker can be looked into."""

    llm: Any

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def vllm_scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def scheduler(self) -> Any:
        return self.vllm_scheduler.connector._scheduler

    @property
    def runner(self) -> Any:
        return get_kv_transfer_group()._runner

    @property
    def catalogue(self) -> Any:
        return self.scheduler.reuse.catalogue

    @property
    def store(self) -> Any:
        """The donors' KV."""
        return self.runner._worker.store

    @property
    def num_free(self) -> int:
        return int(self.vllm_scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def add(self, name: str, prompt: Prompt, max_tokens: int = 4, **knobs: Any) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, extra_args={"kv_transfer_params": {"kvshare": knobs}}, **GREEDY
        )
        self.llm.llm_engine.add_request(name, _asked(prompt), params)

    def plan(self) -> None:
        """Wait for the plans of all that was added, while nothing is being saved: nobody is
        answered meanwhile."""
        if not self.scheduler._heard.is_set():  # no plan is made before a first step
            self.step_until(self.scheduler._heard.is_set)
        wait([x.future for x in self.scheduler._lookups.values() if x.future is not None])

    def step(self) -> list[Any]:
        return [o for o in self.llm.llm_engine.step() if o.finished]

    def run(self) -> dict[str, Any]:
        """All outputs of what was added; afterwards nothing is under way, donors are stored."""
        done: dict[str, Any] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            done.update({o.request_id: o for o in self.step()})
        self.settle()
        return done

    @contextmanager
    def keeping_its_blocks(self) -> Iterator[None]:
        """In the end nothing is held that was free in the beginning."""
        free = self.num_free
        yield
        self.settle()
        assert self.num_free == free, "blocks leaked"
        assert not self.scheduler.busy and not self.scheduler._lookups

    def step_until(self, reached: Callable[[], bool]) -> list[Any]:
        """What is answered until something is so, a step or more; the limit is for a broken
        program, not a measurement."""
        deadline = time.monotonic() + 60
        done = self.step()
        while not reached():
            assert time.monotonic() < deadline, "it never came"
            done += self.step()
        return done

    def settle(self) -> None:
        """Let the scheduler hear of what the workers did last."""
        while self.vllm_scheduler.has_requests():
            self.llm.llm_engine.step()

    def serve(self, prompt: Prompt, max_tokens: int = 4, **knobs: Any) -> Any:
        self.add("one", prompt, max_tokens, **knobs)
        return self.run()["one"]

    def forget(self) -> None:
        """As if just started: no donors, nothing in the prefix cache."""
        self.settle()
        for node in self.catalogue.nodes():
            self.store.delete(node.node_id)
            self.catalogue.remove(node.node_id)
        self.runner._gone.clear()
        assert self.llm.reset_prefix_cache()


def first_token(shared: Shared, prompt: Prompt, logprobs: int = 20, **knobs: Any) -> Any:
    """vLLM's output of one token, with log probabilities; of all tokens for -1."""
    extra = {"kv_transfer_params": {"kvshare": knobs}}
    params = SamplingParams(max_tokens=1, logprobs=logprobs, extra_args=extra, **GREEDY)
    (output,) = shared.llm.generate([_asked(prompt)], params, use_tqdm=False)
    shared.settle()
    return output


def as_native(
    shared: Shared, native: KVShare, donor: Any, target: Any, model: str = "", **knobs: Any
) -> RequestOutput:
    """Both engines, with no donors yet, serve token ids, or messages of a model: the same reuse,
    and the same distribution of the first token. Returns the native engine's output."""
    if shared.catalogue.nodes():
        shared.forget()
    native.cache.clear()

    def natively(prompt: Any, max_tokens: int) -> RequestOutput:
        params = kvshare_mm.SamplingParams(max_tokens=max_tokens, logprobs=10, **GREEDY)
        *_, last = native.stream(prompt, params, RequestOptions(**knobs))
        native.flush()
        assert last.output is not None
        return last.output

    def prompt_for(prompt: Any) -> Prompt:
        return prompt if isinstance(prompt[0], int) else prompt_of(*_read(model, prompt))

    assert tokens(shared.serve(prompt_for(donor))) == list(natively(donor, 4).token_ids)
    output, expected = first_token(shared, prompt_for(target), **knobs), natively(target, 1)
    assert_as_native(output, expected)
    return expected


def assert_as_native(output: Any, expected: RequestOutput) -> None:
    """vLLM's output of one token: the same reuse and the same distribution as natively."""
    p, use = expected.provenance, summary(output)
    found = tuple(use[kind] for kind in ("exact", "reused", "recomputed", "declined"))
    assert found == (p.exact, p.reused, p.recomputed, p.declined)
    assert (use["expected_divergence"] is None) == (p.expected_divergence is None)
    assert expected.logprobs is not None
    theirs = output.outputs[0].logprobs[0]
    for token, logprob in expected.logprobs[0].top:
        assert theirs[token].logprob == pytest.approx(logprob, abs=2e-3)


def stream_of(model: Path | str, messages: list[dict[str, Any]]) -> SegmentStream:
    """A chat as the engine's own door reads it."""
    return _read(model, messages)[0]


def _read(model: Path | str, messages: list[dict[str, Any]]) -> tuple[SegmentStream, Any]:
    tokenizer = load_tokenizer(str(model))
    support = picture_support(KVShareConfig(model=str(model)), locate(str(model)), tokenizer)
    stream = chat_stream(messages, tokenizer, support)[0]
    return stream, tokens_written(support, tokenizer)


def summary(output: Any) -> dict[str, Any]:
    """What the response says about reuse."""
    return dict(output.kv_transfer_params["kvshare"])


def ids(length: int, seed: int = 0) -> list[int]:
    """A random prompt."""
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def edited(prompt: list[int], at: int = 100, new: int = 5, left_out: int = 0) -> list[int]:
    """`prompt` with `new` other tokens at `at` instead of some."""
    return [*prompt[:at], *ids(new, 1000 + at), *prompt[at + left_out :]]


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


@contextmanager
def shared_engine(model: Path | str, options: dict[str, Any], **more: Any) -> Iterator[Shared]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = _llm(model, kv_transfer_config=kv_transfer_config(options), **more)
    try:
        yield Shared(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()


@contextmanager
def stock_engine(model: Path | str, **more: Any) -> Iterator[Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    llm = _llm(model, **more)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def patience() -> Iterator[None]:
    """Engines of `KVShare` that start meanwhile wait for plans, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            arguments,
            "kv_transfer_config",
            lambda options: kv_transfer_config({**options, "lookup_deadline_s": 30}),
        )
        yield


def stock_tokens(llm: Any, prompt: Prompt, max_tokens: int = 4) -> list[int]:
    params = SamplingParams(max_tokens=max_tokens, **GREEDY)
    (output,) = llm.generate([_asked(prompt)], params, use_tqdm=False)
    return tokens(output)


def _asked(prompt: Prompt) -> dict[str, Any]:
    return prompt if isinstance(prompt, dict) else {"prompt_token_ids": list(prompt)}


def _llm(model: Path | str, **more: Any) -> Any:
    return LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        **more,
    )
