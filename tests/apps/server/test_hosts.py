"""By which names a server may be asked, and which pages may ask it."""

from __future__ import annotations

import pytest

from kvshare_mm.apps.server.hosts import HostCheck, allowed_hosts, cors_origins
from kvshare_mm.errors import ConfigError

from ..conftest import Run
from .conftest import ADMIN, Running, Start
from .test_disconnect import test_within_a_decode_step_of_a_stream as disconnects

_HERE = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:8000", "[::1]", "[0:0::1]:8000"]
_OTHER = ["evil.example", "evil.example:8000", "localhost.evil.example",
          "127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0:8000", "[::2]", "xn--localhost-x",
          "127.1", "2130706433"]  # fmt: skip
_NONE = ["", "localhost/x", "user@localhost", "::1", "[::1", "a b", "a:b"]


@pytest.mark.parametrize(
    ("host", "statuses"),
    [
        *((h, {None}) for h in _HERE),
        *((h, {421}) for h in _OTHER),
        *((h, {400, 421}) for h in _NONE),
    ],
)
def test_only_this_machines_names_are_answered(host: str, statuses: set[int | None]) -> None:
    error = HostCheck(allowed_hosts((), "127.0.0.1", False)).error(host)
    assert (None if error is None else error.status) in statuses
    if statuses == {421}:
        assert "--allowed-host" in str(error)


def test_what_it_listens_on_counts() -> None:
    def answers(bound: str, host: str, *given: str, keys: bool = False) -> bool:
        return HostCheck(allowed_hosts(given, bound, keys)).error(host) is None

    assert answers("10.0.0.1", "10.0.0.1:80") and not answers("10.0.0.1", "10.0.0.2:80")
    # On all addresses, any of them: only a name can be made to lead here.
    for bound in ("0.0.0.0", "::"):
        assert answers(bound, "10.0.0.2:80") and answers(bound, "[2001:db8::1]")
        assert not answers(bound, "evil.example") and not answers(bound, "127.0.0.1.evil.example")
    assert answers("0.0.0.0", "shop.example", "shop.example")
    assert answers("0.0.0.0", "a.b.shop.example", "*.shop.example")
    assert not answers("0.0.0.0", "evilshop.example", "*.shop.example")
    assert answers("0.0.0.0", "evil.example", "*")
    # With keys a page that got here by a trick has none, until names are given.
    assert answers("0.0.0.0", "proxy.example", keys=True)
    assert not answers("0.0.0.0", "evil.example", "shop.example", keys=True)
    # No browser leaves it out.
    assert HostCheck(("localhost",)).error(None) is None


@pytest.mark.parametrize("origin", ["*", "https://shop.example", "http://[::1]:3000"])
def test_origins(origin: str) -> None:
    assert cors_origins((origin,)) == (origin,)


@pytest.mark.parametrize(
    ("option", "value"),
    [*(("--allowed-host", v) for v in ("", "http://x", "a:80", "*.", "a*", "shop.*", "a/b",
                                       "*.*.x")),
     *(("--cors-origin", v) for v in ("", "shop.example", "https://shop.example/", "https://*.x",
                                      "HTTPS://x", "null"))],
)  # fmt: skip
def test_what_is_no_name_or_origin_is_refused_at_the_start(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=option):
        if option == "--cors-origin":
            cors_origins((value,))
        else:
            allowed_hosts((value,), "127.0.0.1", False)


def test_the_command_refuses_what_cannot_be_meant(run: Run) -> None:
    for words, said in (
        (["--allowed-host", "http://x"], "--allowed-host http://x"),
        (["--cors-origin", "x"], "--cors-origin x"),
        (["--ssl-certfile", "none.pem"], "none.pem"),
        (["--api-key", "a key"], "the API key"),
        (["--api-key", "x", "--api-keys", "file"], "either --api-keys"),
    ):
        done = run("serve", "smollm2", "--port", 0, *words)
        assert done.exit_code == 1, words
        assert said in " ".join(done.output.split()), done.output


def test_a_rebound_name_reaches_nothing(serve: Start) -> None:
    running = serve(allowed_hosts=allowed_hosts((), "127.0.0.1", False))
    for path in ("/v1/models", "/metrics", "/health", "/docs", "/ui", "/ui/config", "/none"):
        reply = running.ask("GET", path, headers={"Host": "evil.example"})
        assert reply.status_code == 421, path
        assert reply.json()["error"]["code"] == "unknown_host"
    assert running.ask("GET", "/v1/models").status_code == 200


def test_pages_of_chosen_origins_may_ask(serve: Start) -> None:
    page, other = "https://shop.example", "https://evil.example"
    running = serve(cors_origins=(page,), api_key="the-key")
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    def preflight(origin: str) -> tuple[int, str | None]:
        path = "/v1/chat/completions"
        reply = running.ask("OPTIONS", path, headers={"Origin": origin, **asked})
        return reply.status_code, reply.headers.get("access-control-allow-origin")

    assert preflight(page) == (200, page)
    assert preflight(other) == (400, None)
    refused = running.ask("GET", "/v1/models", headers={"Origin": page})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == page
    elsewhere = running.ask("GET", "/v1/models", "the-key", headers={"Origin": other})
    assert "access-control-allow-origin" not in elsewhere.headers


def test_no_page_may_ask_unless_chosen(shared: Running) -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    reply = shared.ask("OPTIONS", "/v1/chat/completions", headers=asked)
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_clients_that_go_away_are_noticed_through_it(
    serve: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def with_origins(engine: dict[str, int]) -> Running:
        return serve(engine, cors_origins=("*",))

    disconnects(with_origins, caplog)
    assert " 499 " in caplog.text


def test_private_pages_need_an_admin_key(serve: Start) -> None:
    running = serve(private_pages=True, api_key="the-key")
    for path in ("/metrics", "/docs", "/openapi.json"):
        statuses = [running.ask("GET", path, key).status_code for key in (None, "the-key", ADMIN)]
        assert statuses == [401, 403, 200], path
    assert running.ask("GET", "/health").status_code == 200
    without_keys = serve(private_pages=True)
    assert without_keys.ask("GET", "/metrics").status_code == 403
    assert without_keys.ask("GET", "/metrics", ADMIN).status_code == 200
    assert without_keys.chat("hello").status_code == 200


def test_one_key_for_all(serve: Start) -> None:
    running = serve(api_key="the-key", scope="tenant")
    assert "the-key" not in repr(running.service.options)
    assert ADMIN not in repr(running.service.options)
    statuses = [running.chat("hello", key).status_code for key in (None, "other", "the-key")]
    assert statuses == [401, 401, 200]
    assert running.ask("GET", "/v1/cache", "the-key").status_code == 403
    assert running.ask("GET", "/v1/cache", ADMIN).status_code == 200
