"""`kvshare audit`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from kvshare_mm.apps.terminal import console, plain_errors, report_file, write_report

if TYPE_CHECKING:
    from kvshare_mm.apps.audit.servers import InProcess, Remote


def audit(
    requests: Annotated[
        Path,
        typer.Option(
            help='your log, JSON Lines: OpenAI request bodies, {"messages": [...]}, '
            '{"prompt": "..."} or {"text": "..."}'
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="hub name, folder, .gguf file or smollm2; with --url: its name there"),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="ask this running server instead: `kvshare serve`, or vLLM with KVShare"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", "--key", envvar="KVSHARE_API_KEY", help="API key of the server"),
    ] = None,
    max_divergence: Annotated[
        str | None,
        typer.Option(
            help="how far first tokens may be off (KL): smaller is closer to full; several, like "
            "0.001,0.01,0.05, are compared; default: the server's"
        ),
    ] = None,
    repair: Annotated[str | None, typer.Option(help="repair policy; default: the server's")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="longest answer to requests that name none")
    ] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N requests")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="also write the results to this file", callback=report_file),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="also write a page with every changed answer", callback=report_file),
    ] = None,
) -> None:
    """Will it change my answers? Replays your own log with reuse and in full.

    Requests are served in the log's order, one at a time and greedily: with reuse, so that later
    requests find earlier ones; with prefix caching alone; in full. You see how many answers are
    the same, the changed ones side by side, changed numbers and names apart, and what was saved.

        kvshare audit --requests log.jsonl --html audit.html

        kvshare audit --requests log.jsonl --url http://127.0.0.1:8000 --limit 100

    If too much changes, see what a tighter bound does, and what it costs:

        kvshare audit --requests log.jsonl --max-divergence 0.001,0.01,0.05

    Replays keep their donors apart from each other's and everybody's, in a server within its one
    budget. With --json or --html, a run that was
    killed goes on where it stopped if it is started again in the same way. Reports hold answers,
    and the beginnings and ends of questions; never a key.
    """
    from kvshare_mm.apps.audit import log, show
    from kvshare_mm.apps.audit.replay import replay, settings, ways_of
    from kvshare_mm.apps.audit.report import summary
    from kvshare_mm.apps.bench.journal import Journal

    with plain_errors():
        ways = ways_of(_bounds(max_divergence), repair)
        asked = log.read_log(requests, max_tokens, limit)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with closing(_server(model, url, api_key, len(ways))) as server:
            journal = Journal.beside(
                json_file or html, settings(asked, server.name, url or "", ways)
            )
            with Progress(*columns, console=console, transient=True) as bar:
                at = bar.add_task("Replaying", total=len(asked))
                results = replay(server, asked, ways, journal, lambda: bar.advance(at))
        report = summary(asked, results, server.name)
        show.in_terminal(report, console)
        if html:
            html.write_text(show.page(report), encoding="utf-8")
            console.print(f"Page written to {html}", markup=False)
        write_report(report, json_file)
        Journal.forget(json_file or html)


def _bounds(given: str | None) -> list[float]:
    try:
        return sorted({float(word) for word in (given or "").split(",") if word.strip()})
    except ValueError as error:
        raise typer.BadParameter(
            f"{given}: numbers, like 0.001,0.01", param_hint="--max-divergence"
        ) from error


def _server(
    model: str | None, url: str | None, key: str | None, replays: int
) -> InProcess | Remote:
    """What answers. Raises what `KVShare`, `InProcess` and `Remote` do."""
    import psutil

    from kvshare_mm.apps.audit.servers import InProcess, Remote
    from kvshare_mm.config import KVShareConfig
    from kvshare_mm.llm import KVShare

    if url is not None:
        return Remote(url, model, key)
    console.print(f"Loading [bold]{escape(model or 'smollm2')}[/] ...")
    # Replays that evict each other's donors would reuse, and change, less than one alone.
    room = KVShareConfig.of().host_budget()
    room = max(room, min(room * replays, psutil.virtual_memory().available // 2))
    return InProcess(
        KVShare(
            model or "smollm2",
            embedder=None,
            local_media=False,  # a log may hold strangers' paths
            host_bytes=room,
            audit_share=0,  # all is computed in full here, and nothing shall depend on when
        )
    )
