"""The engines: vLLM where it is installed, else the native one, which has been there already."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .engines import Engine, Native


@pytest.fixture(scope="module", params=["vllm" if importlib.util.find_spec("vllm") else "native"])
def start(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Starts an engine with a model and options of KVShare."""
    torch.set_num_threads(1)
    if request.param == "native":
        return Native
    from .in_vllm import InVLLM

    return InVLLM


@pytest.fixture(scope="module")
def running(start: Callable[..., Engine], random_model: Callable[[str], Path]) -> Iterator[Engine]:
    engine = start(random_model("llama"))
    yield engine
    engine.close()


@pytest.fixture
def engine(running: Engine) -> Engine:
    running.forget()
    return running


@pytest.fixture(scope="module")
def plain(random_model: Callable[[str], Path]) -> Iterator[Native]:
    """The same model, computed in full by the native engine."""
    engine = Native(random_model("llama"), reuse="off")
    yield engine
    engine.close()


@pytest.fixture
def in_full(plain: Native, engine: Engine) -> Callable[..., None]:
    """Checks that an answer is what the whole prompt, computed in full, gives."""

    def check(output: Any) -> None:
        assert output.provenance.reused == 0
        want = plain.ask(list(output.prompt_token_ids), len(output.token_ids))
        assert output.token_ids == want.token_ids
        assert output.logprobs is not None and want.logprobs is not None
        found = dict(output.logprobs[0].top)
        for token, logprob in want.logprobs[0].top[:10]:
            assert found[token] == pytest.approx(logprob, abs=engine.precision)

    return check
