"""Who may ask, and who may share with whom."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.apps.server.keys import Caller, KeyRing, add_key, digest
from kvshare_mm.apps.server.scope import in_words, scope
from kvshare_mm.errors import ConfigError, InvalidRequestError

from ...helpers import until
from ...native.test_states import _DELTA, _folder
from .conftest import ADMIN, Running, Start

_TEXT = "Laboratory report. Patient number 48210. Haemoglobin 148 g/L, sodium 141 mmol/L. Value?"


Ring = tuple[Path, dict[str, str]]
Keyed = tuple[Running, dict[str, str]]


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    """A file of keys, and the keys."""
    file = tmp_path / "keys.jsonl"
    return file, {
        "a": add_key(file, "shop-a"),
        "a2": add_key(file, "shop-a"),
        "b": add_key(file, "shop-b"),
        "boss": add_key(file, "office", admin=True),
    }


@pytest.fixture
def keyed(serve: Start, ring: Ring) -> Keyed:
    """A server that asks for those keys, and the keys."""
    return serve(keys_file=ring[0], scope="tenant", admin_key=None), ring[1]


def cached(running: Running, key: str | None = None, text: str = _TEXT, **fields: Any) -> int:
    """Tokens reused for one request; checked against its provenance."""
    running.llm.flush()
    reply = running.chat(text, key, **fields)
    assert reply.status_code == 200, reply.text
    told = reply.json()["kvshare"]
    found = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert found == told["exact"] + told["reused"]
    assert bool(found) == bool(told["donors"])
    running.llm.flush()
    return int(found)


def timing_classes(running: Running) -> dict[str, float]:
    """First tokens so far by what was reused: what a stop-watch could tell apart."""
    name = 'kvshare:time_to_first_token_seconds_count{model_name="tiny",reuse="%s"}'
    return {reuse: running.metric(name % reuse) for reuse in ("none", "exact", "similar")}


def test_tenants_never_share(keyed: Keyed) -> None:
    running, keys = keyed
    assert cached(running, keys["a"]) == 0
    assert cached(running, keys["b"]) == 0  # the same prompt, another tenant
    assert timing_classes(running) == {"none": 2, "exact": 0, "similar": 0}
    assert cached(running, keys["a"]) > 0
    assert cached(running, keys["a2"]) > 0  # another key of the same tenant
    assert cached(running, keys["b"]) > 0
    assert cached(running, keys["a"], cache_salt="own") == 0
    assert cached(running, keys["b"], cache_salt="own") == 0
    assert cached(running, keys["a"], cache_salt="own") > 0
    assert timing_classes(running) == {"none": 4, "exact": 4, "similar": 0}


def test_the_log_says_whose_request_it_was(
    serve: Start, ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file, keys = ring
    running = serve(keys_file=file, scope="tenant", admin_key=None)
    until(lambda: "tiny is ready after" in caplog.text)
    assert running.chat("x", keys["b"]).status_code == 200
    assert running.chat("x").status_code == 401

    def told() -> list[Any]:
        gate = (r for r in caplog.records if r.name == "kvshare_mm.apps.server.gate")
        return [r.fields for r in gate if "completions" in r.getMessage()]  # type: ignore[attr-defined]

    until(lambda: len(told()) == 2)  # a line is written behind its answer
    assert [fields.get("tenant") for fields in told()] == ["shop-b", None]


def test_a_tenant_cannot_spell_its_way_to_another(keyed: Keyed) -> None:
    running, keys = keyed
    cached(running, keys["a"])
    for salt in ("shop-a", '["tenant", "shop-a", null]', '", "shop-a', "null"):
        assert cached(running, keys["b"], cache_salt=salt) == 0


def test_only_equal_salts_share(serve: Start) -> None:
    running = serve(scope="salt")
    assert cached(running) == 0
    assert cached(running) == 0  # no salt: nobody to share with, not even itself
    assert running.llm.stats()["donors"]["nodes"] == 0
    assert cached(running, cache_salt="x") == 0
    assert cached(running, cache_salt="y") == 0
    assert cached(running, cache_salt="x") > 0
    assert cached(running, cache_salt="x", kvshare={"reuse": "similar"}) > 0
    assert cached(running, kvshare={"reuse": "similar"}) == 0  # what is off stays off


def test_all_share_but_salts_are_apart(serve: Start) -> None:
    running = serve(scope="global")
    assert cached(running, "some-key") == 0
    assert cached(running, "other-key") > 0
    assert cached(running, cache_salt="x") == 0
    assert cached(running, cache_salt="x") > 0
    assert cached(running, cache_salt="y") == 0


@pytest.mark.parametrize("salt", ["", "a@b", "a/b", "a\\b", "a\0b", "x" * 129])
def test_malformed_salts_are_refused(salt: str) -> None:
    for mode in ("tenant", "salt", "global"):
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            scope(mode, Caller("a"), salt)  # type: ignore[arg-type]


def test_scopes_of_all_modes_are_different() -> None:
    salts = [None, "a", "b", '["tenant", "a", null]']
    scopes = [scope("tenant", Caller(t), s).cache_salt for t in ("a", "b") for s in salts]
    scopes += [scope("global", Caller(), s).cache_salt for s in salts]
    assert len(set(scopes)) == len(scopes)
    assert scope("salt", Caller("a"), "x") == scope("salt", Caller("b"), "x")


def test_the_words_of_the_start_line() -> None:
    assert "ALL" in in_words("global") and "tenant" in in_words("tenant")


def test_wrong_keys_are_401(keyed: Keyed) -> None:
    running, keys = keyed
    for key in (None, "wrong", keys["a"] + "x", digest(keys["a"])):
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
            ("GET", "/v1/cache"),
            ("GET", "/v1/nothing"),
        ):
            reply = running.ask(method, path, key)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
    assert running.ask("GET", "/health").status_code == 200
    assert running.ask("GET", "/v1/models", keys["a"]).status_code == 200
    # Of the right ones only an administrator's sees the cache.
    assert running.ask("GET", "/v1/cache", keys["a"]).status_code == 403
    assert running.ask("GET", "/v1/cache", keys["boss"]).status_code == 200


@pytest.mark.parametrize("end", ["%0a", "%0d", "%00", "%7f", "%0a%0a"])
def test_a_page_is_not_spelt_in_another_way(serve: Start, ring: Ring, end: str) -> None:
    file, keys = ring
    running = serve(keys_file=file, scope="tenant", admin_key=None, private_pages=True)
    for path in (
        "/v1/cache",
        "/v1/cache/clear",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v1/models",
    ):
        for key in keys.values():
            assert running.ask("GET", path + end, key).status_code == 404


def test_without_a_file_only_the_admin_key_does(shared: Running) -> None:
    assert shared.chat("x").status_code == 200
    statuses = [shared.ask("GET", "/v1/cache", key).status_code for key in (None, "wrong", ADMIN)]
    assert statuses == [403, 403, 200]


def test_a_deleted_line_ends_a_key(ring: Ring, keyed: Keyed) -> None:
    file, _ = ring
    running, keys = keyed
    assert running.ask("GET", "/v1/models", keys["a"]).status_code == 200
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if digest(keys["a"]) not in line))
    assert running.ask("GET", "/v1/models", keys["a"]).status_code == 401
    assert running.ask("GET", "/v1/models", keys["b"]).status_code == 200
    file.write_text("")
    assert running.ask("GET", "/v1/models", keys["b"]).status_code == 401


def test_a_key_ends_whatever_the_file_looks_like_from_outside(ring: Ring) -> None:
    """As copying with preserved times leaves it: as old and as large as before."""
    file, keys = ring
    known = KeyRing(file)
    before = file.stat()
    new = "kvs-another"
    file.write_text(file.read_text().replace(digest(keys["a"]), digest(new)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known.caller(keys["a"]) is None
    assert known.caller(new) == Caller("shop-a", key=digest(new))


def test_a_file_that_could_not_be_read_for_a_moment_is_read_later(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when all file descriptors are in use: nothing about the file changes afterwards."""
    file, keys = ring
    known = KeyRing(file)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with monkeypatch.context() as short, caplog.at_level(logging.ERROR):

        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

        short.setattr(Path, "open", refuse)
        for _ in range(3):
            assert known.caller(keys["a"]) is not None
    assert sum("Too many open files" in r.getMessage() for r in caplog.records) == 1
    assert known.problem is not None
    assert known.caller(keys["a"]) is None and known.caller(keys["b"]) is not None
    assert known.problem is None


def test_a_key_is_added_behind_a_line_that_has_no_end(ring: Ring) -> None:
    file, keys = ring
    file.write_text(file.read_text().rstrip("\n"))
    new = add_key(file, "shop-c")
    known = KeyRing(file)
    for key, tenant in ((keys["boss"], "office"), (new, "shop-c")):
        caller = known.caller(key)
        assert caller is not None and caller.tenant == tenant


def test_the_file_keeps_no_keys(ring: Ring) -> None:
    file, keys = ring
    text = file.read_text()
    assert not any(key in text for key in keys.values())
    assert [json.loads(line)["tenant"] for line in text.splitlines()] == [
        "shop-a", "shop-a", "shop-b", "office",
    ]  # fmt: skip
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    boss = KeyRing(file).caller(keys["boss"])
    assert boss == Caller("office", admin=True, key=digest(keys["boss"]))


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        "{}",
        '{"tenant": "a", "sha256": "short"}',
        '{"tenant": "", "sha256": "%s"}' % ("0" * 64),
        '{"tenant": "a", "admin": "no", "sha256": "%s"}' % ("0" * 64),
        '{"tenant": "a", "sha256": "%s", "limits": {"cups_of_tea": 1}}' % ("0" * 64),
        "[" * 100_000,
        "\udcff",  # a byte that is no UTF-8
    ],
)
def test_bad_files_of_keys_are_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"# a comment\n\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="line 3"):
        KeyRing(file)
    with pytest.raises(ConfigError, match="line 3"):
        add_key(file, "a")
    with pytest.raises(ConfigError, match="cannot read"):
        KeyRing(tmp_path / "missing")
    with pytest.raises(ConfigError, match="no name"):
        add_key(tmp_path / "new", "a b")


def test_tenants_go_on_from_their_own_states(
    serve: Start, ring: Ring, tiny_folder: Path, tmp_path: Path
) -> None:
    engine = {"model": str(_folder(_DELTA, tiny_folder, tmp_path / "model"))}
    running = serve(engine, keys_file=ring[0], scope="tenant", admin_key=None)
    keys = ring[1]
    assert cached(running, keys["a"]) == 0
    tokens = running.llm.tokenize([{"role": "user", "content": _TEXT}])
    n = tokens.index(running.llm.tokenizer.eos_token_id) + 1  # the turn ends
    assert cached(running, keys["a2"]) == n  # of the same shop
    assert cached(running, keys["b"]) == 0
    whole = running.chat(_TEXT, keys["a"], kvshare={"reuse": "off"}).json()
    stop = whole["choices"][0]["message"]["content"][1:3]
    chat = running.client(keys["a"]).chat.completions
    asked = {"model": "tiny", "messages": [{"role": "user", "content": _TEXT}], "temperature": 0}
    *pieces, last = chat.create(**asked, max_tokens=4, stream=True)  # type: ignore[call-overload]
    said = "".join(c.choices[0].delta.content or "" for c in (*pieces, last))
    assert said == whole["choices"][0]["message"]["content"]
    assert last.model_extra["kvshare"]["exact"] == n
    cut = chat.create(**asked, max_tokens=4, stop=[stop])  # type: ignore[call-overload]
    assert cut.choices[0].message.content == said[: said.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    hot = [
        chat.create(**asked | {"temperature": 2.0, "seed": 7}, max_tokens=9)  # type: ignore[call-overload]
        for _ in range(2)
    ]
    assert len({reply.choices[0].message.content for reply in hot}) == 1
    assert running.metric('kvshare:declined_total{model_name="tiny",reason="recurrent_layers"') == 7
    cleared = running.ask("POST", "/v1/cache/clear", keys["boss"], json={"all": True})
    assert cleared.status_code == 200 and cleared.json()["deleted"] > 0
    assert cached(running, keys["a"]) == 0
