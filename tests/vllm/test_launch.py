"""What is handed to vLLM, before vLLM is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.chat import chat_stream
from kvshare_mm.config import KVShareConfig, RequestOptions
from kvshare_mm.errors import ConfigError, InvalidRequestError
from kvshare_mm.models.loader import load_tokenizer
from kvshare_mm.reuse.repair import MaxDivergence
from kvshare_mm.vllm import kv_transfer_config
from kvshare_mm.vllm.options import ConnectorOptions, request_options
from kvshare_mm.vllm.pictures import picture_support


def test_config_is_json_and_recomputes_what_cannot_be_loaded() -> None:
    config = kv_transfer_config({"store_dir": Path("donors"), "max_divergence": 0.1})
    assert json.loads(json.dumps(config)) == config
    assert config["kv_load_failure_policy"] == "recompute"
    options = ConnectorOptions.of(config["kv_connector_extra_config"])
    assert options.core.store_dir == Path("donors")
    assert options.core.policy == MaxDivergence(0.1)
    assert options.core.embedder is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reused": "off"}, "reused"),
        ({"sharing": "off"}, "sharing is called reuse now"),
        ({"reuse": "sometimes"}, "reuse"),
        ({"lookup_deadline_s": 0}, "lookup_deadline_s"),
        ({"max_num_seqs": 4}, "max_num_seqs"),
        ({"host_bytes": 1}, "host_bytes"),
        ({"core": None}, "core"),
        ({"repair": "tail:8+magic"}, "repair.*magic"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        kv_transfer_config(options)


def test_a_request_that_says_nothing() -> None:
    for params in (None, {}, {"kvshare": None}, {"other": 1}):
        assert request_options(params) == RequestOptions()


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"reuse": "all"}, "reuse"),
        ({"store": "perhaps"}, "store"),
        ({"max_divergence": -1}, "max_divergence"),
        ({"repair": "magic"}, "repair"),
        ({"repair": "window:4+magic:0.1"}, "magic"),
        ({"repair": "none", "max_divergence": 0.1}, "repair"),
        ({"shoring": "off"}, "shoring"),
        ({"audit": True}, "audit"),
        ({"audit_share": 1}, "audit_share"),
        ({"sharing": "off"}, "sharing is called reuse now"),
        ([], "kvshare"),
        ({1: 2}, "there is no 1"),
    ],
)
def test_a_wrong_knob_is_named(knobs: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named) as caught:
        request_options({"kvshare": knobs})
    assert caught.value.field is not None and "kvshare" in caught.value.field


def test_a_model_of_text_takes_no_pictures(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_folder))
    config = KVShareConfig(model=str(tiny_folder))
    support = picture_support(config, str(tiny_folder), tokenizer)
    assert not support.adapters.modalities
    picture = {"type": "image_url", "image_url": {"url": "lamp.png"}}
    with pytest.raises(InvalidRequestError, match="image_url"):
        chat_stream([{"role": "user", "content": [picture]}], tokenizer, support)
