"""The model's cores, beside the threads that embed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from kvshare_mm.index.base import IndexUnavailableError

from ..helpers import until
from .asking import _PROMPTS, Gate, Inbox, OpenLLM, inside, params


def test_the_model_keeps_its_cores_beside_the_threads_that_embed(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def open_index() -> Any:
        seen["embedding"] = torch.get_num_threads()
        raise IndexUnavailableError("none here")

    monkeypatch.setattr("kvshare_mm.assemble.open_dense", lambda *_: open_index)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        llm = open_llm(embedder="any", max_num_seqs=1)
        prefill = inside(llm).runner.prefill

        def recorded(*args: Any) -> torch.Tensor:
            seen["model"] = torch.get_num_threads()
            return prefill(*args)

        def similar(*args: Any) -> tuple[str, ...]:
            seen["search"] = torch.get_num_threads()
            return ()

        inside(llm).runner.prefill = recorded
        inside(llm).donors.reuse.similar = similar
        # Who waits for a slot is searched for, and nobody else.
        gate = Gate(inside(llm).runner, "decode")
        inboxes = [Inbox(llm, prompt, params(3)) for prompt in _PROMPTS[:3]]
        until(lambda: "search" in seen)
        gate.open()
        for inbox in inboxes:
            inbox.result()
        llm.flush()
        assert seen == {"embedding": 1, "model": 2, "search": 1}
        later = threading.Thread(target=lambda: seen.update(later=torch.get_num_threads()))
        later.start()
        later.join()
        assert (torch.get_num_threads(), seen["later"]) == (2, 2)
    finally:
        torch.set_num_threads(before)
