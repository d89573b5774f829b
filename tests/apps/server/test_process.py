"""`kvshare serve` as a process of its own, with a real model: what its README promises."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from .soak import settled, soak

pytestmark = pytest.mark.e2e

_README = Path(__file__).resolve().parents[3] / "apps" / "server" / "README.md"
_QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
_GREEDY: dict[str, Any] = {
    "model": "smollm2",
    "messages": _QUESTION,
    "temperature": 0,
    "max_tokens": 20,
}


@dataclass
class Process:
    """A server process; `log` grows while it runs."""

    url: str
    popen: subprocess.Popen[str]
    state: Path
    log: list[str]
    reader: threading.Thread

    def stop(self) -> int:
        """Its exit status; then the log is whole."""
        self.popen.send_signal(signal.SIGTERM)
        status = self.popen.wait(90)
        self.reader.join(60)
        return status


def start(state: Path, *options: str, max_files: int | None = None, **environment: str) -> Process:
    limit = ["bash", "-c", f'ulimit -n {max_files} && exec "$@"', "bash"] if max_files else []
    popen = subprocess.Popen(
        [*limit, sys.executable, "-m", "kvshare_mm.apps.cli", "serve", "smollm2", "--port", "0",
         "--embedder", "none", "--json-logs", *options],
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XDG_STATE_HOME": str(state), **environment},
    )  # fmt: skip
    assert popen.stderr is not None
    log: list[str] = []
    for line in popen.stderr:
        assert json.loads(line)["level"] in {"info", "warning"}
        found = re.search(r"listening on (https?://[\w.:]+)", line)
        if found:
            reader = threading.Thread(target=log.extend, args=[popen.stderr], daemon=True)
            reader.start()
            return Process(found[1], popen, state, log, reader)
    pytest.fail(f"the server ended with {popen.wait()}")


def wait_ready(url: str, verify: ssl.SSLContext | bool = True) -> None:
    deadline = time.monotonic() + 600  # the first run on a machine converts the model
    while httpx2.get(f"{url}/health", verify=verify, timeout=60).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = start(tmp_path_factory.mktemp("state"))
    wait_ready(made.url)
    yield made
    assert made.stop() == 0
    assert list(made.state.rglob("*.key")) == []


def test_openais_client_gets_its_answer(process: Process) -> None:
    client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(**_GREEDY)
    assert "Paris" in str(whole.choices[0].message.content)
    streamed = client.chat.completions.create(stream=True, **_GREEDY)
    text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
    assert text == whole.choices[0].message.content


def test_the_async_client_streams_many_at_once(process: Process) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)

        async def one() -> str:
            stream = await client.chat.completions.create(stream=True, **_GREEDY)
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

        async with client:
            return await asyncio.gather(*(one() for _ in range(8)))

    texts = asyncio.run(ask())
    assert all("Paris" in text for text in texts)


def _examples() -> list[str]:
    return re.findall(r"```sh\n(curl .*?)\n```", _README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_examples_work(process: Process) -> None:
    examples = _examples()
    assert len(examples) >= 5
    for example in examples:
        here = example.replace("http://127.0.0.1:8000", process.url)
        here = here.replace("curl ", "curl --fail-with-body ", 1)
        done = subprocess.run(
            ["bash", "-c", here], check=False, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{example}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip()
    [whole, streamed, continued, *_] = examples
    assert '"stream": true' in streamed and "/v1/completions" in continued and "chat" in whole


def test_the_command_administrates_ones_own_server(process: Process) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(process.state)}
    environment.pop("KVSHARE_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-m", "kvshare_mm.apps.cli", "cache", "stats", "--url", process.url],
        check=False, capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "smollm2"


def test_many_clients_get_their_own_answers(process: Process) -> None:
    tally = asyncio.run(soak(process.url, clients=12, seconds=15))
    assert tally.failed == []
    assert tally.mixed == []
    assert tally.answered > 0 and tally.killed > 0
    assert [x for x in tally.changed if x[0] == "exact"] == []
    assert len(tally.changed) <= tally.answered / 3
    assert asyncio.run(settled(process.url))


def test_it_ends_in_order(tmp_path: Path) -> None:
    made = start(tmp_path, "--store-dir", str(tmp_path / "store"))
    wait_ready(made.url)
    replies: list[httpx2.Response] = []
    body = {**_GREEDY, "max_tokens": 30, "ignore_eos": True}
    asking = threading.Thread(
        target=lambda: replies.append(
            httpx2.post(f"{made.url}/v1/chat/completions", json=body, timeout=300)
        )
    )
    asking.start()
    running = "vllm:num_requests_running{"
    # On a busy machine it may be over before anybody looks.
    while asking.is_alive() and not any(
        line.startswith(running) and line.endswith(" 1.0")
        for line in httpx2.get(f"{made.url}/metrics", timeout=60).text.splitlines()
    ):
        time.sleep(0.02)
    assert made.stop() == 0
    asking.join()
    assert replies[0].json()["usage"]["completion_tokens"] == 30
    assert list((tmp_path / "store").rglob("*.kvnode"))


def test_every_line_of_the_log_is_json(tmp_path: Path) -> None:
    """Also what the libraries behind dense search have to say."""
    made = start(tmp_path, "--embedder", "all-MiniLM-L6-v2")
    wait_ready(made.url)
    reply = httpx2.post(f"{made.url}/v1/chat/completions", json=_GREEDY, timeout=300)
    assert reply.status_code == 200
    key = next((tmp_path / "kvshare").glob("*.key")).read_text()
    headers = {"Authorization": f"Bearer {key}"}
    donors = f"{made.url}/v1/cache/donors"
    while httpx2.get(donors, headers=headers, timeout=60).json()["total"] == 0:
        time.sleep(0.1)
    assert made.stop() == 0  # what was answered has been embedded and written by then
    entries = [json.loads(line) for line in made.log]
    messages = [entry["message"] for entry in entries]
    assert any("smollm2 is ready after" in message for message in messages)
    assert messages[-1] == "stopped"
    assert {entry["level"] for entry in entries} == {"info"}


def test_a_crowd_does_not_use_up_the_files(tmp_path: Path) -> None:
    """600 clients that say half of a request, where 400 files may be open."""
    made = start(tmp_path, "--max-connections-per-client", "200", max_files=400)
    address = urlsplit(made.url)
    place = (address.hostname, address.port)
    with ExitStack() as crowd:
        for i in range(600):
            source = (f"127.0.0.{2 + i // 300}", 0)
            client = socket.create_connection(place, timeout=30, source_address=source)
            crowd.enter_context(closing(client))
            with suppress(ConnectionError):  # it was refused
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        wait_ready(made.url)
        # Not because they went: their time has run out.
        open_now = "kvshare:connections 1.0\n"
        deadline = time.monotonic() + 60
        while open_now not in httpx2.get(f"{made.url}/metrics", timeout=60).text:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert made.stop() == 0
    assert not any("Too many open files" in line for line in made.log)
    told = [line for line in made.log if "connections are refused" in line]
    assert 1 <= len(told) <= 3
    assert len(made.log) < 1000


def test_one_key_in_the_environment_over_https(tmp_path: Path) -> None:
    certificate = Path(__file__).with_name("certificate.pem")
    made = start(
        tmp_path, "--ssl-certfile", str(certificate), KVSHARE_SERVER_API_KEY="only-this-key"
    )
    assert made.url.startswith("https://127.0.0.1:")
    trusted = ssl.create_default_context(cafile=str(certificate))
    with httpx2.Client(base_url=made.url, verify=trusted, timeout=60) as client:
        assert client.get("/v1/models").status_code == 401
        key = {"Authorization": "Bearer only-this-key"}
        assert client.get("/v1/models", headers=key).status_code in {200, 503}
    wait_ready(made.url, trusted)  # who loads a model may take longer than there is for an end
    assert made.stop() == 0
    assert not any("only-this-key" in line for line in made.log)
