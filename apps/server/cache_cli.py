"""``kvshare cache``: administration of a running server's donors."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from kvshare_mm.apps.terminal import audited, plain_errors, print_table
from kvshare_mm.errors import KVShareError

cache = typer.Typer(help="List, pin, delete and look up the stored requests of a running server.")
console = Console()

_KEY_VARIABLE = "KVSHARE_API_KEY"

Url = Annotated[str, typer.Option(help="the server")]
Key = Annotated[
    str | None,
    typer.Option(
        help=f"admin key; default: {_KEY_VARIABLE}, or that of your own server on this port"
    ),
]
Namespace = Annotated[str | None, typer.Option(help="only of this namespace")]
AsJson = Annotated[bool, typer.Option("--json", help="print what the server said")]
Donor = Annotated[str, typer.Argument(help="id of a donor, or its beginning")]
_HERE = "http://127.0.0.1:8000"


class _Server:
    """Asks a server. Raises KVShareError in plain words."""

    def __init__(self, url: str, key: str | None) -> None:
        from kvshare_mm.apps.server import admin_key

        self._url = url.rstrip("/").removesuffix("/v1")
        own = admin_key.read(urlsplit(self._url).port or 80)
        self._key = key or os.environ.get(_KEY_VARIABLE) or own

    def __call__(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        import httpx2

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            reply = httpx2.request(
                method,
                f"{self._url}/v1/cache{path}",
                json=body,
                params={k: v for k, v in query.items() if v is not None},
                headers=headers,
                timeout=60,
            )
            said = reply.json()
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise KVShareError(f"{self._url} does not answer as a server: {error}") from error
        if reply.status_code != 200:
            detail = said.get("error", {}) if isinstance(said, dict) else {}
            raise KVShareError(
                f"{self._url} says {reply.status_code}: {detail.get('message', said)}"
            )
        return said

    def donor(self, start: str) -> str:
        """The one donor whose id begins so."""
        found = [d["donor_id"] for d in self("GET", "/tree")["data"]]
        fitting = [donor_id for donor_id in found if donor_id.startswith(start)]
        if len(fitting) != 1:
            raise KVShareError(f"{len(fitting)} donors have an id that begins with {start!r}")
        return quote(fitting[0], safe="")


@cache.command()
def stats(url: Url = _HERE, key: Key = None) -> None:
    """Counters since the server's start and sizes now."""
    with plain_errors():
        console.print_json(json.dumps(_Server(url, key)("GET", "")))


@cache.command("list")
def list_(
    url: Url = _HERE,
    key: Key = None,
    namespace: Namespace = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="donors listed")] = 50,
    as_json: AsJson = False,
) -> None:
    """Stored requests, the newest first."""
    with plain_errors():
        said = _Server(url, key)("GET", "/donors", namespace=namespace, limit=limit)
        if as_json:
            console.print_json(json.dumps(said))
            return
        rows = [["donor", "namespace", "tokens", "owned", "exact", "parent", "tier", "age"]]
        rows += [
            [
                d["donor_id"][:8],
                d["namespace"][-8:],
                str(d["num_tokens"]),
                str(d["num_owned"]),
                str(d["exact_len"]),
                (d["parent"] or "-")[:8],
                f"{d['tier'] or '-'}{' (pinned)' if d['pinned_s'] else ''}",
                f"{d['age_s']:.0f} s",
            ]
            for d in said["data"]
        ]
        print_table(f"{len(said['data'])} of {said['total']} donors", rows, console)


@cache.command()
def families(
    url: Url = _HERE, key: Key = None, namespace: Namespace = None, as_json: AsJson = False
) -> None:
    """What audits found, by family of requests: those below one root of the tree."""
    with plain_errors():
        said = _Server(url, key)("GET", "/families", namespace=namespace)
        if as_json:
            console.print_json(json.dumps(said))
            return
        rows = [["family", "namespace", "audits", "within", "factor"]]
        rows += [[f["family"][:8], f["namespace"][-8:], *audited(f)] for f in said["data"]]
        print_table(f"{said['total']} families", rows, console)


@cache.command()
def show(donor: Donor, url: Url = _HERE, key: Key = None) -> None:
    """One stored request; its text only if the server was started with --expose-prompts."""
    with plain_errors():
        server = _Server(url, key)
        console.print_json(json.dumps(server("GET", f"/donors/{server.donor(donor)}")))


@cache.command()
def tree(url: Url = _HERE, key: Key = None, namespace: Namespace = None) -> None:
    """Draw which request was edited from which."""
    with plain_errors():
        said = _Server(url, key)("GET", "/tree", namespace=namespace)
        root = Tree(f"{said['total']} donors")
        branches: dict[str, Tree] = {}
        for d in sorted(said["data"], key=lambda d: d["depth"]):
            label = f"{d['donor_id'][:8]}  {d['num_tokens']} tokens, owns {d['num_owned']}"
            branches[d["donor_id"]] = branches.get(d["parent"], root).add(label)
        console.print(root)


@cache.command()
def pin(
    donor: Donor,
    ttl: Annotated[float, typer.Option(min=1, help="seconds")] = 3600,
    url: Url = _HERE,
    key: Key = None,
) -> None:
    """Keep a donor from eviction for a while."""
    with plain_errors():
        server = _Server(url, key)
        said = server("POST", f"/donors/{server.donor(donor)}/pin", {"ttl_s": ttl})
        console.print(f"{said['donor_id']} stays for {said['pinned_s']:g} s")


@cache.command()
def unpin(donor: Donor, url: Url = _HERE, key: Key = None) -> None:
    """Let a donor be evicted again."""
    with plain_errors():
        server = _Server(url, key)
        said = server("DELETE", f"/donors/{server.donor(donor)}/pin")
        console.print(f"{said['donor_id']} may be evicted")


@cache.command()
def delete(donor: Donor, url: Url = _HERE, key: Key = None) -> None:
    """Delete a donor."""
    with plain_errors():
        server = _Server(url, key)
        said = server("DELETE", f"/donors/{server.donor(donor)}")
        console.print(f"{said['donor_id']} is deleted")


@cache.command()
def clear(
    url: Url = _HERE,
    key: Key = None,
    namespace: Namespace = None,
    tenant: Annotated[str | None, typer.Option(help="of this tenant")] = None,
    cache_salt: Annotated[str | None, typer.Option(help="of this salt")] = None,
    all_: Annotated[bool, typer.Option("--all", help="of everybody")] = False,
) -> None:
    """Delete the donors of a namespace, of a tenant and salt, or all."""
    with plain_errors():
        body = {"namespace": namespace, "tenant": tenant, "cache_salt": cache_salt, "all": all_}
        said = _Server(url, key)("POST", "/clear", body)
        console.print(f"{said['deleted']} donors are deleted")


@cache.command()
def lookup(
    prompt: Annotated[str, typer.Argument(help="what a user would say; - reads standard input")],
    raw: Annotated[bool, typer.Option(help="a plain prompt, not a chat")] = False,
    tenant: Annotated[str, typer.Option(help="whose request it would be")] = "",
    cache_salt: Annotated[str | None, typer.Option(help="its salt")] = None,
    url: Url = _HERE,
    key: Key = None,
) -> None:
    """What a request would reuse if it came now, and why not more; nothing is run."""
    with plain_errors():
        text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
        body: dict[str, Any] = {"tenant": tenant, "cache_salt": cache_salt}
        body |= {"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]}
        said = _Server(url, key)("POST", "/lookup", body)
        if "tokens" in said:
            line = f"{said['tokens']} tokens: {said['exact']} exact, {said['similar']} similar, "
            line += f"{said['missing']} missing"
            if said["donors"]:
                line += f" | from {', '.join(d[:8] for d in said['donors'])}"
        else:
            line = "nothing is looked up"
        if said["declined"]:
            line += f" | {said['declined'].replace('_', ' ')}"
        console.print(escape(line), soft_wrap=True)
