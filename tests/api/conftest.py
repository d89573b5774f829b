"""Servers of the tiny model for the tests of the Python API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvshare_mm import KVShare, RequestOptions, RequestOutput

from .prompts import _PARAMS, _TARGET


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
    return llm.generate(_TARGET, _PARAMS, RequestOptions(reuse="off"))
