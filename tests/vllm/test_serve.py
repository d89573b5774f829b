"""vLLM's own server with KVShare in it, in a process of its own, started in both ways."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvshare_mm.apps.bench.template import pair
from kvshare_mm.models.loader import locate
from kvshare_mm.vllm import kv_transfer_config

from .servers import SMALL, server

pytestmark = pytest.mark.vllm


def _by_kvshare(port: int) -> list[str]:
    command = [sys.executable, "-m", "kvshare_mm.apps.cli", "serve", "smollm2"]
    options = ["--engine", "vllm", "--port", str(port), "--max-model-len", "1024"]
    return [*command, *options, "--", *SMALL]


def _by_vllm(port: int) -> list[str]:
    # `vllm serve`, as the builds for CPUs can be started.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = ["--served-model-name", "smollm2", "--port", str(port), "--max-model-len", "1024"]
    connector = ["--kv-transfer-config", json.dumps(kv_transfer_config())]
    command += ["--model", locate("smollm2")]
    return [*command, *options, "--enable-prompt-tokens-details", *connector, *SMALL]


@pytest.fixture(params=[_by_kvshare, _by_vllm], ids=["kvshare serve", "vllm serve"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with server(request.param, tmp_path / "log") as address:
        yield address


def _ask(url: str, content: str, **extra: Any) -> dict[str, Any]:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": content}]}
    reply = httpx2.post(
        f"{url}/v1/chat/completions",
        json={**body, "max_tokens": 8, "temperature": 0, **extra},
        timeout=120,
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_similar_requests_share_and_it_is_told(url: str) -> None:
    assert "Paris" in str(_ask(url, "What is the capital of France?")["choices"])
    prompts = pair(reports=1, values=4)
    _ask(url, prompts["donor"])
    time.sleep(1)  # stored behind the answer
    off = {"kv_transfer_params": {"kvshare": {"reuse": "off"}}, "cache_salt": "off"}
    plain = _ask(url, prompts["target"], **off)
    reply = _ask(url, prompts["target"])
    summary = reply["kv_transfer_params"]["kvshare"]
    total = reply["usage"]["prompt_tokens"]
    assert summary["reused"] > total // 2
    assert sum(summary[k] for k in ("exact", "reused", "recomputed")) == total
    assert (
        reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        == summary["exact"] + summary["reused"]
    )
    assert plain["kv_transfer_params"]["kvshare"]["reused"] == 0
    for _ in range(100):
        metrics = httpx2.get(f"{url}/metrics", timeout=30).text
        lines = [x for x in metrics.splitlines() if x.startswith("kvshare:prompt_tokens_total")]
        found = [float(x.rpartition(" ")[2]) for x in lines if 'source="reused"' in x]
        if found:
            break
        time.sleep(0.2)
    assert found == [summary["reused"]]
