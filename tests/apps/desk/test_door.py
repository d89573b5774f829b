"""Who may come in at the desk, and whose what is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from kvshare_mm.apps.desk.door import Door
from kvshare_mm.apps.server.keys import Caller
from kvshare_mm.apps.server.scope import scope

from .conftest import MARK, PNG, Site, application, ask, talk, upload


def test_nothing_is_answered_before_a_login(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    client = site(keys[0]).stranger()
    assert client.get("/ui/").headers["location"] == "login"
    for path in ("config", "theme.css", "gradio_api/info", "gradio_api/app_id", "assets/index.js",
                 "gradio_api/startup-events", "gradio_api/heartbeat/x", "gradio_api/file=x",
                 "gradio_api/queue/data?session_hash=x", "static/img/logo.svg"):  # fmt: skip
        assert client.get(f"/ui/{path}").status_code == 401, path
    assert upload(client, PNG).status_code == 401
    event = {"data": [], "fn_index": 0, "session_hash": "x"}
    assert client.post("/ui/gradio_api/queue/join", json=event).status_code == 401


def test_a_session_ends_with_its_key(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    file, key, _ = keys
    client = site(file).visitor("shop-a", key)
    token = upload(client, PNG).json()[0]
    assert ask(client, {"path": token, "meta": MARK})[0] == 200
    with client.stream("GET", "/ui/gradio_api/heartbeat/page") as beating:
        beats = beating.iter_bytes()
        assert b"ALIVE" in next(beats)
        lines = [line for line in file.read_text().splitlines() if "shop-a" not in line]
        file.write_text("\n".join(lines) + "\n")
        ended = threading.Event()

        def rest() -> None:
            for _ in beats:
                pass
            ended.set()

        threading.Thread(target=rest, daemon=True).start()
        assert ended.wait(60), "the stream goes on without its key"
    assert client.get("/ui/config").status_code == 401
    assert upload(client, PNG).status_code == 401
    assert client.get(f"/ui/gradio_api/file={token}").status_code == 401
    event = {"data": [None], "fn_index": 0, "session_hash": "page"}
    assert client.post("/ui/gradio_api/queue/join", json=event).status_code == 401


def test_logging_in_is_slowed(site: Callable[..., Site], keys: tuple[Path, str, str]) -> None:
    file, key, other = keys
    client = site(file).stranger()
    replies = [
        client.post("/ui/login", data={"username": tenant, "password": tried})
        for tenant, tried in [("shop-a", "x"), ("shop-x", "x"), ("shop-a", other), ("shop-x", key)]
    ]
    # Nothing tells a tenant that exists from one that does not, nor a key that does.
    assert {(r.status_code, r.text) for r in replies} == {(401, replies[0].text)}
    for number in range(100):
        form = {"username": "shop-a", "password": f"guess {number}"}
        replies.append(client.post("/ui/login", data=form))
    slowed = [r for r in replies if r.status_code == 429]
    assert len(slowed) >= 90
    assert all(int(r.headers["retry-after"]) >= 1 for r in slowed)
    assert not any("set-cookie" in r.headers for r in replies)


def test_the_one_key_of_a_server_needs_no_tenant() -> None:
    async def use(client: httpx2.AsyncClient) -> list[int]:
        statuses = []
        for key in ("", "another", "the-one-key"):
            await client.post("/ui/login", data={"username": "", "password": key})
            statuses.append((await client.get("/ui/config")).status_code)
        return statuses

    assert talk(application(api_key="the-one-key")[0], use) == [401, 401, 200]


def test_cookies_are_for_the_desk_alone_and_end_at_logout(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    file, key, _ = keys
    running = site(file)
    client = running.stranger()
    form = {"username": "shop-a", "password": key}
    cookie = client.post("/ui/login", data=form).headers["set-cookie"].lower()
    for flag in ("httponly", "samesite=lax", "path=/ui"):
        assert flag in cookie
    assert client.get("/ui/config").status_code == 200
    assert client.get("/v1/models").status_code == 401  # a login opens the page alone
    copied = running.stranger()
    copied.cookies.update(client.cookies)
    assert copied.get("/ui/config").status_code == 200
    assert client.post("/ui/logout").status_code == 303
    assert copied.get("/ui/config").status_code == 401


def test_under_tls_the_cookie_is_only_for_tls() -> None:
    async def use(client: httpx2.AsyncClient) -> str:
        return str((await client.get("/ui/")).headers["set-cookie"])

    assert "Secure" in talk(application()[0], use, "https")


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Origin": "null"},
                {"Sec-Fetch-Site": "cross-site"}]
)  # fmt: skip
def test_another_sites_page_cannot_act(
    site: Callable[..., Site], keys: tuple[Path, str, str], headers: dict[str, str]
) -> None:
    file, key, _ = keys
    client = site(file).visitor("shop-a", key)
    event = {"data": [], "fn_index": 0, "session_hash": "x"}
    join = client.post("/ui/gradio_api/queue/join", json=event, headers=headers)
    assert join.status_code == 403
    form = {"username": "shop-a", "password": key}
    assert client.post("/ui/login", data=form, headers=headers).status_code == 403
    assert client.post("/ui/logout", headers=headers).status_code == 403
    got = client.get("/ui/config", headers=headers)
    assert "access-control-allow-origin" not in got.headers


def test_the_address_of_the_page_is_what_the_browser_said(site: Callable[..., Site]) -> None:
    client = site().visitor()
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    assert "evil.example" not in client.get("/ui/", headers=forged).text


def test_visitors_do_not_reach_each_other(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    file, a, b = keys
    running = site(file)
    first, second = running.visitor("shop-a", a), running.visitor("shop-b", b)
    token = upload(first, PNG).json()[0]
    assert upload(second, PNG).json()[0] != token
    assert first.get(f"/ui/gradio_api/file={token}").content == PNG
    assert second.get(f"/ui/gradio_api/file={token}").status_code == 404
    assert ask(first, {"path": token, "meta": MARK}, "mine")[0] == 200
    assert ask(second, {"path": token, "meta": MARK}, "yours")[0] == 400
    assert second.get("/ui/gradio_api/queue/data?session_hash=mine").status_code == 404
    # A page of the same name is another page: what Gradio keeps of the first is not its.
    assert ask(second, None, "mine")[0] == 200
    [door] = [r.app for r in running.app.routes if isinstance(getattr(r, "app", None), Door)]
    of_first, of_second = (set(v.pages) for v in door._visitors._visitors.values())
    assert of_first and of_second and not of_first & of_second
    assert not {"mine", "yours"} & (of_first | of_second)


def test_no_request_reaches_the_namespaces_of_the_desk() -> None:
    salts = {"x", "desk", json.dumps(["desk", "0"]), '["desk", "0"]', 'desk", "0'}
    for mode in ("tenant", "salt", "global"):
        for tenant in ("", "desk"):
            for salt in salts:
                made = scope(mode, Caller(tenant), salt).cache_salt  # type: ignore[arg-type]
                assert made is not None and json.loads(made)[0] != "desk"
