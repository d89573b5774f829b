"""`kvshare calibrate`: requests are answered in order, and all that reused similar ones audited."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.apps.terminal import audited
from kvshare_mm.errors import ConfigError, InvalidRequestError
from kvshare_mm.llm import KVShare
from kvshare_mm.reuse.calibration import MISS_SHARE
from kvshare_mm.sampling import SamplingParams

_SHOWN = 20  # families of the table
_WORDS = 48  # characters of a family's first request


def read_requests(path: Path, limit: int | None = None) -> list[Any]:
    """Prompts and messages of a JSON Lines file: bodies of OpenAI's API, or ``{"text"}``.

    Raises:
        ConfigError: no such file, or a line that asks for nothing; says which.
    """
    asked = []
    for number, row in enumerate(read_jsonl(path, limit=limit), 1):
        said = [{"role": "user", "content": row["text"]}] if "text" in row else None
        found = said or row.get("messages") or row.get("prompt")
        if not isinstance(found, str | list):
            raise ConfigError(f"{path}: request {number} has neither messages, prompt nor text")
        asked.append(found)
    return asked


def run(llm: KVShare, asked: list[Any], max_tokens: int) -> dict[str, Any]:
    """Serve all requests, each audited before the next one.

    Returns:
        Tokens by provenance, audits by result and families, JSON-ready.

    Raises:
        ConfigError: the model's KV cannot be reused.
    """
    if not llm.has_cache:
        raise ConfigError("there is nothing to calibrate: this model reuses no KV")
    params = SamplingParams(max_tokens=max_tokens)
    skipped = 0
    for request in track(asked, "Requests", transient=True):
        try:
            if isinstance(request, list) and isinstance(request[0], dict):
                llm.chat(request, params)
            else:
                llm.generate(request, params)
        except InvalidRequestError:
            skipped += 1
        llm.wait_audited()
    stats = llm.stats()
    families = []
    for family in llm.cache.families():
        begins = " ".join((llm.cache.text(family.family) or "").split())
        families.append({**asdict(family), "begins": begins})
    return {
        "kind": "calibration",
        "model": stats["model"],
        "requests": len(asked) - skipped,
        "skipped": skipped,
        "tokens": {k: v for k, v in stats["requests"].items() if k.startswith("prompt_tokens")},
        "audits": stats["audits"],
        "families": families,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report: what was within the bound, by family."""
    table = Table()
    for heading in ("family", "audits", "within", "factor", "its first request"):
        table.add_column(heading, justify="right" if heading != "its first request" else "left")
    for row in report["families"][:_SHOWN]:
        table.add_row(row["family"][:8], *audited(row), row["begins"][:_WORDS])
    console.print(table)
    audits = sum(row["audits"] for row in report["families"])
    misses = sum(row["misses"] for row in report["families"])
    if not audits:
        console.print("No request was similar enough to another one to reuse its KV.")
        return
    console.print(
        f"{report['requests']} requests, {audits} audits in {len(report['families'])} families: "
        f"{1 - misses / audits:.1%} within max_divergence, {1 - MISS_SHARE:.0%} are promised. "
        "A factor below 1 means that more is reused from now on, above 1 less."
    )
