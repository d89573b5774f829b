"""`/v1/cache` and `kvshare cache`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ..conftest import Run
from .conftest import ADMIN, Running, Start

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))
_DONOR = f"Laboratory report. Patient number 48210. {_ROWS} What is value 3?"
_TARGET = f"Laboratory report. Patient number 77. {_ROWS} What is value 3?"


@pytest.fixture
def running(serve: Start) -> Running:
    """A server with two donors, the second edited from the first, and one under a salt."""
    made = serve({"repair": "none"})
    for text, fields in ((_DONOR, {}), (_TARGET, {}), (_DONOR, {"cache_salt": "x"})):
        assert made.chat(text, **fields).status_code == 200  # type: ignore[arg-type]
        made.llm.flush()
    return made


@pytest.fixture
def cli(run: Run, running: Running, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("KVSHARE_API_KEY", ADMIN)
    return lambda *arguments: run("cache", *arguments, "--url", running.url)


def admin(running: Running, method: str, path: str, **options: Any) -> Any:
    reply = running.ask(method, f"/v1/cache{path}", ADMIN, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_stats_donors_and_tree(running: Running) -> None:
    told = admin(running, "GET", "")
    assert told["donors"]["nodes"] == 3
    assert told["scope"] == "global"
    listed = admin(running, "GET", "/donors")
    assert listed["total"] == 3
    salted, child, parent = listed["data"]
    assert child["parent"] == parent["donor_id"]
    assert salted["namespace"] != parent["namespace"]
    page = admin(running, "GET", "/donors", params={"limit": 1, "offset": 1})
    assert [d["donor_id"] for d in page["data"]] == [child["donor_id"]] and page["total"] == 3
    mine = admin(running, "GET", "/donors", params={"namespace": parent["namespace"]})
    assert mine["total"] == 2
    drawn = admin(running, "GET", "/tree", params={"namespace": parent["namespace"]})["data"]
    assert [(d["donor_id"], d["depth"]) for d in drawn] == [
        (parent["donor_id"], 0), (child["donor_id"], 1),
    ]  # fmt: skip


def test_families_of_audited_requests(
    run: Run, serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve({"repair": "none", "audit_share": 1})
    for text in (_DONOR, _TARGET):
        assert running.chat(text).status_code == 200
        assert running.llm.wait_audited(60)
    told = admin(running, "GET", "/families")
    [family] = told["data"]
    root = admin(running, "GET", "/donors")["data"][1]
    assert (family["family"], family["audits"]) == (root["donor_id"], 1)
    assert admin(running, "GET", "/families", params={"namespace": "x"})["total"] == 0
    monkeypatch.setenv("KVSHARE_API_KEY", ADMIN)
    shown = run("cache", "families", "--url", running.url).output
    assert "1 families" in shown and root["donor_id"][:8] in shown


def test_text_is_never_shown_unless_the_operator_says_so(running: Running, serve: Start) -> None:
    for path in ("", "/donors", "/tree", f"/donors/{_first(running)}"):
        assert "Laboratory" not in json.dumps(admin(running, "GET", path))
        assert '"text"' not in json.dumps(admin(running, "GET", path))
    open_one = serve(expose_prompts=True)
    open_one.chat(_DONOR)
    open_one.llm.flush()
    assert "Laboratory" in admin(open_one, "GET", f"/donors/{_first(open_one)}")["text"]


def test_pin_delete_and_clear(running: Running) -> None:
    donor = _first(running)
    admin(running, "POST", f"/donors/{donor}/pin", json={"ttl_s": 60})
    assert 0 < admin(running, "GET", f"/donors/{donor}")["pinned_s"] <= 60
    admin(running, "DELETE", f"/donors/{donor}/pin")
    assert running.ask("DELETE", f"/v1/cache/donors/{donor}/pin", ADMIN).status_code == 404
    admin(running, "DELETE", f"/donors/{donor}")
    for method, path in (("GET", ""), ("DELETE", "")):
        assert running.ask(method, f"/v1/cache/donors/{donor}{path}", ADMIN).status_code == 404
    assert admin(running, "POST", "/clear", json={"tenant": ""})["deleted"] == 2
    assert admin(running, "POST", "/clear", json={"all": True})["deleted"] == 0
    assert running.chat(_TARGET).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_lookup_tells_what_the_request_then_does(running: Running) -> None:
    text = _TARGET.replace("77", "91")
    told = admin(running, "POST", "/lookup", json={"messages": [{"role": "user", "content": text}]})
    used = running.chat(text, kvshare={"store": False}).json()["kvshare"]
    assert (told["exact"], told["similar"]) == (used["exact"], used["reused"])
    assert told["similar"] > 0 and told["missing"] > 0
    assert told["exact"] + told["similar"] + told["missing"] == told["tokens"]
    before = admin(running, "GET", "")["requests"]["requests"]
    elsewhere = {"cache_salt": "nobody's", "messages": [{"role": "user", "content": text}]}
    alone = admin(running, "POST", "/lookup", json=elsewhere)
    assert (alone["exact"], alone["similar"], alone["declined"]) == (0, 0, "no_donor")
    plain = admin(running, "POST", "/lookup", json={"prompt": "short"})
    assert plain["declined"]
    assert admin(running, "GET", "")["requests"]["requests"] == before


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/clear", {}),
        ("POST", "/clear", {"everything": True}),
        ("POST", "/donors/x/pin", {"ttl_s": 0}),
        ("POST", "/donors/x/pin", {"ttl_s": "long"}),
        ("POST", "/lookup", {}),
        ("GET", "/donors?limit=0", None),
        ("GET", "/donors?offset=-1", None),
        ("GET", "/donors?offset=6%0C", None),
        ("GET", "/donors?limit=%202", None),
    ],
)
def test_bad_requests(shared: Running, method: str, path: str, body: Any) -> None:
    reply = shared.ask(method, f"/v1/cache{path}", ADMIN, json=body)
    assert reply.status_code == 400, reply.text


def test_the_command(running: Running, cli: Run) -> None:
    listed = json.loads(cli("list", "--json").output)
    donor = listed["data"][0]["donor_id"]
    assert donor[:8] in cli("list").output
    assert "3 of 3 donors" in cli("list").output
    assert json.loads(cli("stats").output)["donors"]["nodes"] == 3
    assert json.loads(cli("show", donor[:10]).output)["donor_id"] == donor
    assert "3 donors" in cli("tree").output
    assert "stays for 60 s" in cli("pin", donor, "--ttl", "60").output
    assert "may be evicted" in cli("unpin", donor).output
    looked = cli("lookup", _TARGET.replace("77", "91")).output
    assert "similar" in looked and "from" in looked
    assert "is deleted" in cli("delete", donor).output
    assert "2 donors are deleted" in cli("clear", "--all").output
    missing = cli("show", "nobody")
    assert missing.exit_code == 1 and "0 donors have an id" in missing.output


def test_the_command_says_what_is_wrong(
    run: Run, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVSHARE_API_KEY", raising=False)
    for url, said in ((running.url, "admin key"), ("http://127.0.0.1:9", "does not answer")):
        refused = run("cache", "stats", "--url", url)
        assert refused.exit_code == 1 and said in refused.output


def test_clearing_a_salt_leaves_the_others(running: Running) -> None:
    assert admin(running, "POST", "/clear", json={"cache_salt": "x"})["deleted"] == 1
    assert admin(running, "GET", "")["donors"]["nodes"] == 2


def test_without_reuse_there_is_no_cache(serve: Start) -> None:
    running = serve({"reuse": "off"})
    assert running.ask("GET", "/v1/cache/donors", ADMIN).status_code == 404
    assert running.ask("GET", "/v1/cache", ADMIN).status_code == 200


def _first(running: Running) -> str:
    return str(admin(running, "GET", "/donors")["data"][0]["donor_id"])
