"""The worker's parts, as they are chosen for its device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.model_loader import utils as loading

from kvshare_mm.reuse.worker import ReuseWorker
from kvshare_mm.vllm import build, compat, connector
from kvshare_mm.vllm.options import ConnectorOptions

pytestmark = pytest.mark.vllm


def test_donors_are_moved_by_what_fits_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel where there is a GPU, as natively."""
    layer = SimpleNamespace(kv_cache=torch.zeros(1, 1, 16, 32))
    monkeypatch.setattr(build, "deployment_obstacle", lambda *_: None)
    model = torch.nn.Module()
    monkeypatch.setattr(build.compat, "model", lambda: model)
    monkeypatch.setattr(build.compat, "whole_model", lambda: model)
    monkeypatch.setattr(build, "rotary_spec", lambda *_: None)
    for part in ("PartialForward", "PageLayout", "TieredStore"):
        monkeypatch.setattr(build, part, lambda *_: SimpleNamespace(probe=None))
    made: list[Any] = []
    monkeypatch.setattr(build, "WorkerSide", lambda *parts: made.extend(parts))
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"0": layer}),
        model_config=SimpleNamespace(uses_mrope=False),
        parallel_config=SimpleNamespace(world_size=1, rank=0),
    )
    group = SimpleNamespace(layer_names=["0"], kv_cache_spec=None)
    caches = SimpleNamespace(kv_cache_groups=[group])
    build.build_runner(config, caches, {"0": layer.kv_cache}, ConnectorOptions.of())
    [worker] = [part for part in made if isinstance(part, ReuseWorker)]

    asked: list[tuple[str, str]] = []

    def resolve(backend: str, device: torch.device) -> str:
        asked.append((backend, device.type))
        return "triton"

    monkeypatch.setattr("kvshare_mm.reuse.editor.resolve", resolve)
    worker.load([], "", *torch.zeros(2, 1, 1, 16, 16), None)
    assert asked == [("auto", "cpu")]


def test_a_reason_without_words_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(connector, "build_runner", fails)
    worker = object.__new__(connector.KVShareConnector)
    worker._obstacle = worker._vllm_config = worker._caches_of = worker._options = None
    worker.register_kv_caches({})
    assert worker._obstacle == "AssertionError"


def test_a_class_that_cannot_be_made_without_weights_shares_no_media(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Wants:
        def __new__(cls, more: int) -> Wants:
            return super().__new__(cls)

    monkeypatch.setattr(loading, "get_model_cls", lambda _: Wants)
    asked = SimpleNamespace(uses_mrope=True, mrope_num_dims=3, hf_config=None)
    assert compat.media_positions(SimpleNamespace(model_config=asked)) is None
