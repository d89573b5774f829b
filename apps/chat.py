"""A conversation in the terminal that shows what every answer reused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvshare_mm.chat import Message, Prompt
from kvshare_mm.errors import KVShareError
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.sampling import SamplingParams


def show(
    llm: KVShare, console: Console, prompt: Prompt | Sequence[Message], params: SamplingParams
) -> RequestOutput:
    """Print an answer as it comes."""
    output: RequestOutput | None = None
    for chunk in llm.stream(prompt, params):
        console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
        output = chunk.output
    console.print()
    if output is None:
        raise RuntimeError("the stream ended without an output")
    return output


def reuse_line(output: RequestOutput) -> str:
    """One line: tokens by provenance, donors, first-token time."""
    p = output.provenance
    parts = [f"{p.exact} exact", f"{p.reused} reused", f"{p.recomputed} computed"]
    line = f"{len(output.prompt_token_ids)} prompt tokens: {', '.join(parts)}"
    if p.donors:
        line += f" | from {', '.join(d[:8] for d in p.donors)}"
    elif p.declined:
        line += f" | nothing reused: {p.declined.replace('_', ' ')}"
    if p.fallback:
        line += f" | computed in full: {p.fallback.replace('_', ' ')}"
    return f"{line} | first token after {1000 * output.metrics.ttft:.0f} ms"


def talk(llm: KVShare, console: Console, params: SamplingParams, system: str | None) -> None:
    """Read questions until an empty one, /quit or end of input; /new starts over."""
    console.print("Ask something. [dim]/new starts a new conversation, /quit ends.[/]")
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            question = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question in ("", "/quit"):
            return
        if question == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": question})
        try:
            output = show(llm, console, messages, params)
        except KVShareError as error:
            console.print(f"[red]Error:[/] {escape(str(error))}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": output.text})
        console.print(reuse_line(output), style="dim", soft_wrap=True)
