"""`kvshare audit` on a tiny model: in this process, and at a server."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvshare_mm import KVShare
from kvshare_mm.apps.audit import show
from kvshare_mm.apps.audit.log import Asked, read_log
from kvshare_mm.apps.audit.replay import replay, settings, ways_of
from kvshare_mm.apps.audit.report import summary
from kvshare_mm.apps.audit.servers import InProcess, Refused, Remote, Reply
from kvshare_mm.apps.bench.journal import Journal
from kvshare_mm.errors import ConfigError

from ..conftest import Run
from ..server.conftest import Running, serving

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))
_LINES: list[dict[str, Any]] = [
    {"text": f"Laboratory report. Patient number {n}. {_ROWS} What is value 3?"}
    for n in (48210, 77, 5931)
]
_LINES.append({"text": "The quick brown fox jumps over <b>the</b> lazy dog.", "temperature": 1})
_LINES.append({"prompt": "The quick brown fox", "tools": []})
_LINES.append(_LINES[0])
_LINES.append({"text": "x", "tools": [{"type": "function"}]})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps({"max_tokens": 8, **line}) for line in _LINES))
    return path


@pytest.fixture
def run(run: Run) -> Run:
    return partial(run, "audit")


@pytest.fixture(scope="module")
def shared(tiny_folder: Path) -> Iterator[Running]:
    with serving(lambda: KVShare(str(tiny_folder), embedder=None), api_key="secret") as running:
        yield running


def check(report: dict[str, Any], way: str) -> None:
    reuse, prefix, full = (report["ways"][n] for n in (way, "prefix", "full"))
    assert full["computed"] == full["prompt_tokens"] and full["answers"] == 6
    assert reuse["computed"] < prefix["computed"] < full["computed"]
    assert prefix["same"] == full["same"] == reuse["same"] + reuse["changed"] + reuse["cut"] == 6
    assert reuse["less_than_prefix"] >= 2 and (reuse["by_rounding"], report["sampled"]) == (0, 1)
    [refused] = report["refused"]
    assert refused["line"] == 7 and "tools" in refused["why"]
    first, *_ = report["families"]
    assert (first["line"], first["answers"]) == (1, 4)


def test_in_this_process(run: Run, tiny_folder: Path, log: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    # Nothing is repaired: answers of a random model change then.
    done = run("--requests", log, "--model", tiny_folder, "--repair", "none", "--json", out,
               "--html", page)  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    check(report, "with reuse")
    same, changed = (report["ways"]["with reuse"][key] for key in ("same", "changed"))
    assert f"with reuse: {same} of 6 answers are the same" in done.output
    assert "1 not answered: tools[0].function" in done.output
    assert "asked greedily" in done.output
    html = page.read_text()
    assert len(re.findall("<article>", html)) == changed > 0
    assert not re.search(r"(src|href)=|<script|@import|url\(", html)
    assert not out.with_name("out.json.partial").exists()


@pytest.mark.parametrize("remote", [False, True])
def test_tools_are_offered_and_calls_compared(
    shared: Running, tiny_folder: Path, remote: bool
) -> None:
    tool = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "max_tokens": 40}
    asked = Asked(1, "chat/completions", {**body, "tool_choice": "required"}, "a", ("x",), False)
    if remote:
        side: InProcess | Remote = Remote(shared.url, None, "secret")
    else:
        side = InProcess(KVShare(str(tiny_folder), embedder=None, local_media=False))
    try:
        assert "weigh" in side.ask(asked, {"reuse": "off"}, "a").text
    finally:
        side.close()


def test_several_bounds_share_one_full_pass(
    run: Run, tiny_folder: Path, log: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    done = run(
        "--requests", log, "--model", tiny_folder, "--max-divergence", "100,0", "--json", out
    )
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert list(report["ways"]) == ["max_divergence 0", "max_divergence 100", "prefix", "full"]
    check(report, "max_divergence 100")
    tight, loose = (report["ways"][f"max_divergence {bound}"] for bound in (0, 100))
    assert tight["same"] == 6 and tight["computed"] > loose["computed"]
    assert report["families_of"] == "max_divergence 100"


def test_at_a_server(run: Run, shared: Running, log: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    call = ("--requests", log, "--url", f"{shared.url}/v1", "--api-key", "secret", "--json", out,
            "--html", page)  # fmt: skip
    for _ in range(2):  # what the first audit stored must not be found by the second
        done = run(*call)
        assert done.exit_code == 0, done.output
        check(json.loads(out.read_text()), "with reuse")
        assert "secret" not in out.read_text() + page.read_text() + done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--api-key", "wrong"), "401"),
        (
            ("--api-key", "secret", "--model", "other"),
            "Error: http://127.0.0.1:{port} has no model 'other', but tiny",
        ),
        (("--max-divergence", "-1"), "max_divergence=-1.0"),
        (("--max-divergence", "0.1;0.2"), "numbers, like"),
        (("--url", "http://127.0.0.1:9"), "does not answer"),
        (("--url", "http://me:word@127.0.0.1:9"), "has a password in it"),
    ],
)
def test_what_cannot_be_audited_is_said_in_plain_words(
    run: Run, shared: Running, log: Path, words: tuple[str, ...], said: str
) -> None:
    done = run("--requests", log, "--url", shared.url, *words)
    assert (
        done.exit_code in (1, 2) and said.format(port=shared.url.rpartition(":")[2]) in done.output
    )
    assert "Traceback" not in done.output


def test_a_server_without_kvshare(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Remote, "_json", lambda *_, **__: {"data": [{"id": "m"}]})
    with pytest.raises(ConfigError, match="no KVShare"):
        Remote(shared.url, None, None)


def test_a_bad_line_is_said_before_anything_is_loaded(run: Run, log: Path) -> None:
    log.write_text('{"text": "x"}\n{"question": "y"}\n')
    done = run("--requests", log, "--model", "/nowhere")
    assert done.exit_code == 1
    assert "log.jsonl:2 has no messages" in done.output and "/nowhere" not in done.output


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(log: Path, tmp_path: Path, open_llm: Callable[..., KVShare]) -> None:
    asked, ways = read_log(log, 8), ways_of([], "none")
    whole = replay(InProcess(open_llm()), asked, ways, Journal(None, None))
    path = tmp_path / "journal"
    ticks = iter([False])

    def dies() -> None:
        if next(ticks, True):
            raise Killed

    kept = settings(asked, "m", "", ways)
    with pytest.raises(Killed):
        replay(InProcess(open_llm()), asked, ways, Journal(path, kept), dies)
    server, served = InProcess(open_llm()), []
    real = server.ask
    server.ask = lambda *a: (served.append((a[0].line, a[1]["reuse"])), real(*a))[1]  # type: ignore[method-assign]
    resumed = replay(server, asked, ways, Journal(path, kept))
    assert (1, "off") not in served and (1, "similar") in served and (3, "off") in served
    for a, b in zip(whole, resumed, strict=True):
        for way in a.keys() - {"refused"}:
            assert {**a[way], "ttft": 0} == {**b[way], "ttft": 0}


class Fake:
    """Says something else with reuse; in other chunks, too, of what is not `steady`."""

    name = "<script>m</script>"

    def __init__(self) -> None:
        self.salts: list[tuple[str, str]] = []

    def ask(self, asked: Any, how: Any, salt: str) -> Reply:
        self.salts.append((how["reuse"], salt))
        if asked.line == 2:
            raise Refused("<i>no</i>")
        full = how["reuse"] == "off" or (how["reuse"] == "exact" and asked.line == 1)
        text = "<script>1</script> [/red] Anna" if full else "[bold] 2 Bob"
        return Reply(text, False, 0.1, 10, 5)

    def close(self) -> None: ...


def test_a_stranger_s_text_is_only_text_and_rounding_is_told_from_reuse() -> None:
    hostile = "<img src=x> [/x]"
    body = {"messages": [{"role": "user", "content": hostile}]}
    asked = [Asked(i, "chat/completions", body, "", (hostile,), False) for i in (1, 2, 3)]
    results = replay(Fake(), asked, ways_of([], None), Journal(None, None))
    report = summary(asked, results, Fake.name)
    reuse = report["ways"]["with reuse"]
    assert [reuse[k] for k in ("changed", "numbers", "names", "by_rounding")] == [2, 2, 2, 1]
    html = show.page(report)
    assert not re.search(r"<(script|img|i|u)\b", html)
    assert "<mark>" in html and "&lt;script&gt;" in html
    console = Console(record=True, width=120, file=io.StringIO())
    show.in_terminal(report, console)
    told = console.export_text()
    assert "<script>1</script> [/red] Anna" in told and "[bold] 2 Bob" in told


def test_nothing_is_shared_with_what_is_computed_in_full() -> None:
    fake = Fake()
    body = {"messages": [{"role": "user", "content": "x"}]}
    asked = [Asked(i, "chat/completions", body, "", ("x",), False) for i in (1, 3, 4)]
    replay(fake, asked, ways_of([], None), Journal(None, None))
    assert len({salt for reuse, salt in fake.salts if reuse == "similar"}) == 1
    full = [salt for reuse, salt in fake.salts if reuse == "off"]
    assert len(full) == len(set(full)) == 6  # each once, and once more in other chunks
