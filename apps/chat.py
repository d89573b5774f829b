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


def with_media(
    text: str, images: Sequence[str], sounds: Sequence[str]
) -> str | list[dict[str, Any]]:
    """The content of a message: media first, then the words."""
    if not images and not sounds:
        return text
    parts = [{"type": "image_url", "image_url": {"url": place}} for place in images]
    heard = [{"type": "audio", "audio": place} for place in sounds]
    return [*parts, *heard, {"type": "text", "text": text}]


def reuse_line(output: RequestOutput) -> str:
    """One line: tokens by provenance, donors, media, first-token time."""
    p = output.provenance
    parts = [f"{p.exact} exact", f"{p.reused} reused", f"{p.recomputed} computed"]
    line = f"{len(output.prompt_token_ids)} prompt tokens: {', '.join(parts)}"
    if p.donors:
        line += f" | from {', '.join(d[:8] for d in p.donors)}"
    elif p.declined:
        line += f" | nothing reused: {p.declined.replace('_', ' ')}"
    if p.fallback:
        line += f" | computed in full: {p.fallback.replace('_', ' ')}"
    for use in p.media:
        line += f" | {use.modality} {use.content_hash[:8]} ({use.label}): {_SOURCES[use.source]}"
    return f"{line} | first token after {1000 * output.metrics.ttft:.0f} ms"


_SOURCES = {
    "kv": "known, its KV reused",
    "features": "known, encoder not run",
    "encoder": "new, encoder run",
}


def talk(
    llm: KVShare,
    console: Console,
    params: SamplingParams,
    system: str | None,
    images: Sequence[str] = (),
    sounds: Sequence[str] = (),
) -> None:
    """Read questions until an empty one, /quit or end of input; /new starts over.

    Args:
        images, sounds: paths or URLs that belong to the first question.
    """
    console.print(
        "Ask something. [dim]/image FILE and /audio FILE belong to the next question, "
        "/new starts a new conversation, /quit ends.[/]"
    )
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    seen, heard = list(images), list(sounds)
    while True:
        try:
            question = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question in ("", "/quit"):
            return
        if question == "/new":
            messages, seen, heard = list(start), [], []
            continue
        command, _, place = question.partition(" ")
        if command in ("/image", "/audio") and place.strip():
            (seen if command == "/image" else heard).append(place.strip())
            continue
        messages.append({"role": "user", "content": with_media(question, seen, heard)})
        try:
            output = show(llm, console, messages, params)
        except KVShareError as error:
            console.print(f"[red]Error:[/] {escape(str(error))}")
            messages.pop()
            # Bad media would spoil the next question as well.
            seen, heard = [], []
            continue
        seen, heard = [], []
        messages.append({"role": "assistant", "content": output.text})
        console.print(reuse_line(output), style="dim", soft_wrap=True, markup=False)
