"""vLLM's own server with KVShare in it, in a process of its own, started in both ways."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvshare_mm import assets
from kvshare_mm.apps.bench.template import pair
from kvshare_mm.models.loader import locate
from kvshare_mm.vllm import kv_transfer_config

from ..helpers import until
from .servers import SMALL, server

pytestmark = pytest.mark.vllm

SAMPLES = Path(assets.folder("tiny-vl")) / "samples"
Messages = list[dict[str, Any]]
# On a busy machine plans are waited for; `kvshare` with that, where it has no option for it.
_PATIENCE = {"lookup_deadline_s": 30}
_PATIENT = f"""
from kvshare_mm.apps.cli import app
from kvshare_mm.vllm import arguments
config = arguments.kv_transfer_config
arguments.kv_transfer_config = lambda options: config({{**options, **{_PATIENCE}}})
app()
"""


def _by_kvshare(port: int) -> list[str]:
    command = [sys.executable, "-c", _PATIENT, "serve", "tiny-vl"]
    options = ["--engine", "vllm", "--port", str(port), "--max-model-len", "1024"]
    return [*command, *options, "--audit-share", "1", "--", *SMALL]


def _by_vllm(port: int) -> list[str]:
    # `vllm serve`, as the builds for CPUs can be started.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = ["--served-model-name", "smollm2", "--port", str(port), "--max-model-len", "1024"]
    options += ["--dtype", "float32"]  # bfloat16 answers otherwise on some CPUs
    config = kv_transfer_config({**_PATIENCE, "audit_share": 1})
    connector = ["--kv-transfer-config", json.dumps(config)]
    command += ["--model", locate("smollm2")]
    return [*command, *options, "--enable-prompt-tokens-details", *connector, *SMALL]


def _letters() -> tuple[Messages, Messages]:
    prompts = pair(reports=1, values=4)
    donor, target = ([{"role": "user", "content": prompts[x]}] for x in ("donor", "target"))
    return donor, target


def _photos() -> tuple[Messages, Messages]:
    """What a customer sends with a photo, and the same by one who says a name."""
    first = (SAMPLES / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0]
    system, user = json.loads(first)["messages"]
    for i, part in enumerate(user["content"]):
        if part["type"] == "image":
            png = base64.b64encode((SAMPLES / part["image"]).read_bytes()).decode()
            url = {"url": f"data:image/png;base64,{png}"}
            user["content"][i] = {"type": "image_url", "image_url": url}
    name = {"type": "text", "text": "My name is Viktor, which is none of your business. "}
    return [system, user], [system, {**user, "content": [name, *user["content"]]}]


@pytest.mark.parametrize(
    ("model", "command", "prompts"),
    [("tiny-vl", _by_kvshare, _photos), ("smollm2", _by_vllm, _letters)],
    ids=["kvshare serve", "vllm serve"],
)
def test_similar_requests_share_and_it_is_told(
    model: str,
    command: Callable[[int], list[str]],
    prompts: Callable[[], tuple[Messages, Messages]],
    tmp_path: Path,
) -> None:
    donor, target = prompts()
    with server(command, tmp_path / "log") as url:

        def ask(messages: Messages, salt: str = "", **knobs: Any) -> tuple[str, dict, dict]:
            body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
            params = {"kv_transfer_params": {"kvshare": knobs}}
            salted = {"cache_salt": salt} if salt else {}
            asked = {**body, **params, **salted}
            reply = httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
            assert reply.status_code == 200, reply.text
            said = reply.json()
            answer = str(said["choices"][0]["message"]["content"])
            return answer, said["kv_transfer_params"]["kvshare"], said["usage"]

        first, use, _ = ask(donor)
        assert use["declined"] == "no_donor"
        time.sleep(1)  # stored behind the answer
        plain, off, _ = ask(target, "off", reuse="off")
        assert off["reused"] == 0
        answer, use, usage = ask(target, store=False)
        total, details = usage["prompt_tokens"], usage["prompt_tokens_details"]
        photo = (details.get("multimodal_tokens") or {}).get("image", 0)
        assert use["reused"] >= (photo or total // 2)
        assert sum(use[k] for k in ("exact", "reused", "recomputed")) == total
        assert details["cached_tokens"] == use["exact"] + use["reused"]
        if model == "tiny-vl":
            right = json.loads((SAMPLES / "samples.jsonl").read_text().splitlines()[0])["answer"]
            assert photo > 0 and answer == plain and first == right
        else:
            assert (
                "Paris" in ask([{"role": "user", "content": "What is the capital of France?"}])[0]
            )
        again, wrong, _ = ask(donor, repair="magic:0.1")
        assert (again, wrong["declined"]) == (first, "invalid_options")

        def counted(metric: str, label: str) -> list[float]:
            metrics = httpx2.get(f"{url}/metrics", timeout=30).text
            lines = [line for line in metrics.splitlines() if line.startswith(metric)]
            return [float(x.rpartition(" ")[2]) for x in lines if label in x]

        until(lambda: counted("kvshare:prompt_tokens_total", 'source="reused"') == [use["reused"]])
        # Pictures behind an edit are not computed again for an audit: encoders do not run for it.
        seen = "no_features" if photo else "kept"
        until(lambda: counted("kvshare:audits_total", f'result="{seen}"') == [1], 60)
        assert ("audit" in use) == (not photo)
        assert sum(counted("kvshare:divergence_count", "")) == (not photo)
    assert "is served without KVShare" in (tmp_path / "log").read_text()
