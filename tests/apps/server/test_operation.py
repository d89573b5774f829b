"""What operators rely on: metrics, logs, traces, the end of a server, the dashboard."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import subprocess
import sys
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvshare_mm.apps.server import admin_key, logs, run
from kvshare_mm.apps.server.tracing import Tracer
from kvshare_mm.errors import ConfigError

from ...helpers import until
from .conftest import Running, Start, held

_TEXT = "Laboratory report. Patient number 48210. Haemoglobin 148 g/L, sodium 141 mmol/L. Value?"
_DASHBOARD = Path(__file__).resolve().parents[3] / "assets" / "grafana" / "kvshare.json"
_METRICS = Path(__file__).parents[3] / "docs" / "metrics.md"
_LABEL = '{model_name="tiny"'


def served(serve: Start, **engine: Any) -> Running:
    """A server that has computed, reused exactly and reused something similar."""
    running = serve({"repair": "none", **engine})
    for text in (_TEXT, _TEXT, _TEXT.replace("48210", "77")):
        assert running.chat(text).status_code == 200
        running.llm.flush()
    return running


def test_metrics_agree_with_the_engine(serve: Start) -> None:
    running = served(serve)
    seen = running.llm.stats()["requests"]
    for name, value in {
        "vllm:prompt_tokens_total": seen["prompt_tokens"],
        "vllm:generation_tokens_total": seen["generation_tokens"],
        "vllm:prefix_cache_queries_total": seen["prompt_tokens"],
        "vllm:prefix_cache_hits_total": seen["prompt_tokens_exact"],
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:time_to_first_token_seconds_count": 3,
        "vllm:e2e_request_latency_seconds_count": 3,
        "vllm:inter_token_latency_seconds_count": seen["generation_tokens"] - 3,
        "kvshare:lookup_seconds_count": 3,
        "kvshare:tree_depth": 1,
    }.items():
        assert running.metric(name + _LABEL) == value, name

    def agrees(name: str, counter: str) -> bool:
        return running.metric(name + _LABEL) == running.llm.stats()["requests"][counter]

    # They are counted behind the answer's end.
    until(lambda: agrees("vllm:spec_decode_num_draft_tokens_total", "draft_tokens"))
    until(lambda: agrees("vllm:spec_decode_num_accepted_tokens_total", "draft_accepted"))
    sources = {
        source: running.metric(f'kvshare:prompt_tokens_total{_LABEL},source="{source}"')
        for source in ("exact", "reused", "recomputed")
    }
    assert min(sources.values()) > 0
    assert sum(sources.values()) == seen["prompt_tokens"]
    reuse = 'kvshare:time_to_first_token_seconds_count{model_name="tiny",reuse="%s"'
    assert [running.metric(reuse % kind) for kind in ("none", "exact", "similar")] == [1, 1, 1]
    assert running.metric(f'kvshare:declined_total{_LABEL},reason="no_donor"') == 1
    assert running.metric(f'kvshare:store_bytes{_LABEL},tier="host"') > 0
    route = 'kvshare:http_requests_total{route="/v1/chat/completions",status="200"'
    assert running.metric(route) == 3


def test_the_dashboard_shows_what_there_is(serve: Start) -> None:
    if not _DASHBOARD.exists():
        pytest.fail(f"{_DASHBOARD} is missing")
    said = served(serve, audit_share=1).ask("GET", "/metrics").text
    names = set(re.findall(r"^# TYPE (\S+)", said, re.MULTILINE))
    known = names | {f"{n}{s}" for n in names for s in ("_bucket", "_sum", "_count")}
    board = json.loads(_DASHBOARD.read_text(encoding="utf-8"))
    expressions = [t["expr"] for p in board["panels"] for t in p.get("targets", [])]
    assert len(expressions) >= 10
    used = {name for e in expressions for name in re.findall(r"(?:vllm|kvshare):\w+", e)}
    assert used - known == set()


def test_every_metric_stands_on_its_page(serve: Start) -> None:
    if not _METRICS.parent.exists():
        pytest.skip("no source tree beside the tests")
    said = served(serve, audit_share=1).ask("GET", "/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)", said, re.MULTILINE))
    rows = re.findall(r"^\| `(\S+)` \| (\w+) \|(.*?)\|", _METRICS.read_text("utf-8"), re.MULTILINE)
    assert {name: kind for name, kind, _ in rows} == {
        name: kind for name, kind in kinds.items() if not name.endswith("_created")
    }
    for name, _, labels in rows:
        samples = re.findall(rf"^{name}(?:_bucket|_sum|_count)?{{(.*)}}", said, re.MULTILINE)
        used = {label for each in samples for label in re.findall(r'(\w+)="', each)}
        assert used - {"model_name", "le"} <= set(re.findall(r"`(\w+)`", labels)), name


def test_logs_have_request_ids(shared: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def lines() -> list[logging.LogRecord]:
        gate = (r for r in caplog.records if r.name == "kvshare_mm.apps.server.gate")
        return [r for r in gate if getattr(r, "request_id", "") == request_id]

    with caplog.filtering(logs._WithRequestId()):
        request_id = shared.chat("hello").headers["x-request-id"]
        until(lambda: bool(lines()))  # the line is written behind the answer
    [record] = lines()
    entry = json.loads(logs.JsonFormatter().format(record))
    assert entry["request_id"] == request_id
    assert entry["status"] == 200 and entry["level"] == "info"
    assert "hello" not in json.dumps(entry)


def test_a_line_of_the_log_says_what_was_reused(
    shared: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = {"prompt": "What is the value of the number? " * 4, "max_tokens": 1}
    for stream in (False, True):
        shared.ask("POST", "/v1/completions", json={**body, "stream": stream}).raise_for_status()
    until(lambda: caplog.text.count("prompt tokens: ") == 2)
    first, second = (r for r in caplog.records if "prompt tokens: " in r.getMessage())
    told = [getattr(record, "fields") for record in (first, second)]  # noqa: B009
    assert told[0]["recomputed"] > 1 and "exact" in told[0]
    assert told[1]["exact"] == sum(told[0][k] for k in ("exact", "reused", "recomputed")) - 1
    assert f"{told[1]['exact']} exact, 0 reused, 1 recomputed" in second.getMessage()


def test_traces_join_the_clients(serve: Start) -> None:
    running = serve()
    spans = InMemorySpanExporter()
    running.service.tracer = Tracer(None, "tiny", spans)
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    reply = running.ask("POST", "/v1/chat/completions", headers=headers, json=body)
    running.service.tracer.close()
    [span] = spans.get_finished_spans()
    assert span.attributes is not None
    assert f"{span.context.trace_id:032x}" == trace
    assert span.attributes["gen_ai.request.id"] == reply.headers["x-request-id"]
    told = reply.json()
    completed = span.attributes["gen_ai.usage.completion_tokens"]
    assert completed == told["usage"]["completion_tokens"]
    assert span.attributes["kvshare.recomputed"] == told["kvshare"]["recomputed"]
    assert span.end_time is not None and span.start_time is not None
    assert span.end_time > span.start_time


def test_a_server_ends_when_its_requests_have(serve: Start, beside: Executor) -> None:
    running = serve(shutdown_timeout_s=60)
    with held(running):
        asking = beside.submit(running.chat, "The quick", max_tokens=200, ignore_eos=True)
        until(lambda: running.llm.stats()["queue"]["running"] == 1)
        running.server.should_exit = True
        until(lambda: not running.server.servers[0].is_serving())
    reply = asking.result()
    running.thread.join(30)
    assert reply.status_code == 200
    assert reply.json()["usage"]["completion_tokens"] == 200
    assert not running.thread.is_alive()


def test_donors_outlive_a_server(serve: Start, tmp_path: Path) -> None:
    first = serve({"store_dir": tmp_path})
    first.chat(_TEXT)
    first.stop()
    second = serve({"store_dir": tmp_path})
    assert second.chat(_TEXT).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_port_in_use_is_known_at_once() -> None:
    listening = run.bind("127.0.0.1", 0)
    assert listening.proto == socket.IPPROTO_TCP  # else asyncio delays what it sends
    listening.listen()
    with listening, pytest.raises(ConfigError, match="cannot listen"):
        run.bind("127.0.0.1", listening.getsockname()[1])


def test_the_admin_key_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_key.platformdirs, "user_state_dir", lambda *_, **__: str(tmp_path))
    assert admin_key.read(1234) is None
    old = admin_key.write(1234)
    new = admin_key.write(1234)
    assert admin_key.read(1234) == new != old
    assert stat.S_IMODE(admin_key.key_file(1234).stat().st_mode) == 0o600
    admin_key.remove(1234, old)
    assert admin_key.read(1234) == new
    admin_key.remove(1234, new)
    assert admin_key.read(1234) is None


_UNTIL_TORCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            raise SystemExit(0)

sys.meta_path.insert(0, Watch())
from kvshare_mm.apps.cli import app
app()
"""


@pytest.mark.parametrize("command", ["serve", "ui"])
@pytest.mark.parametrize(("chosen", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_models_threads_wait_asleep(command: str, chosen: str | None, used: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if chosen is not None:
        environment["OMP_WAIT_POLICY"] = chosen
    told = subprocess.run(
        [sys.executable, "-c", _UNTIL_TORCH, command, "smollm2", "--port", "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.stdout.split() == [used], told.stderr
