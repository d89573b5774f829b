"""`kvshare serve tiny-vl --engine vllm`: pictures by OpenAI's API, in a process of its own."""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvshare_mm import assets

from .servers import SMALL, server

pytestmark = pytest.mark.vllm

SAMPLES = Path(assets.folder("tiny-vl")) / "samples"


def _command(port: int) -> list[str]:
    command = [sys.executable, "-m", "kvshare_mm.apps.cli", "serve", "tiny-vl"]
    return [
        *(*command, "--engine", "vllm", "--port", str(port), "--max-model-len", "1024"),
        *("--", *SMALL),
    ]


def _sample() -> tuple[list[dict[str, Any]], str]:
    """A system prompt, what a customer sends with a photo, and the right answer."""
    first = (SAMPLES / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0]
    sample = json.loads(first)
    for message in sample["messages"]:
        for i, part in enumerate(message["content"]):
            if part["type"] == "image":
                png = base64.b64encode((SAMPLES / part["image"]).read_bytes()).decode()
                url = {"url": f"data:image/png;base64,{png}"}
                message["content"][i] = {"type": "image_url", "image_url": url}
    return sample["messages"], sample["answer"]


def test_a_photo_is_answered_and_shared(tmp_path: Path) -> None:
    messages, want = _sample()
    system, user = messages
    name = {"type": "text", "text": "My name is Viktor, which is none of your business. "}
    again = [system, {**user, "content": [name, *user["content"]]}]
    with server(_command, tmp_path / "log") as url:

        def ask(asked: list[dict[str, Any]], **knobs: Any) -> dict[str, Any]:
            body = {"model": "tiny-vl", "messages": asked, "max_tokens": 24, "temperature": 0}
            params = {"kv_transfer_params": {"kvshare": knobs}}
            reply = httpx2.post(f"{url}/v1/chat/completions", json={**body, **params}, timeout=120)
            assert reply.status_code == 200, reply.text
            return dict(reply.json())

        def answer(reply: dict[str, Any]) -> str:
            return str(reply["choices"][0]["message"]["content"])

        first = ask(messages)
        assert answer(first) == want
        assert first["kv_transfer_params"]["kvshare"]["declined"] == "no_donor"
        time.sleep(1)  # stored behind the answer
        reply = ask(again, store=False)
        summary = reply["kv_transfer_params"]["kvshare"]
        usage = reply["usage"]
        photo = usage["prompt_tokens_details"]["multimodal_tokens"]["image"]
        assert summary["reused"] >= photo > 0
        assert sum(summary[k] for k in ("exact", "reused", "recomputed")) == usage["prompt_tokens"]
        assert answer(reply) == answer(ask(again, reuse="off"))
        wrong = ask(messages, repair="magic:0.1")
        assert answer(wrong) == want
        assert wrong["kv_transfer_params"]["kvshare"]["declined"] == "invalid_options"
    assert "is served without KVShare" in (tmp_path / "log").read_text()
