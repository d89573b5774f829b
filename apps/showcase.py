"""`kvshare demo`: stories, each served by full recompute, prefix caching and KVShare."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from kvshare_mm.apps.stories import STORIES, Story
from kvshare_mm.apps.token_view import legend, token_view
from kvshare_mm.config import RequestOptions, Reuse
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.sampling import SamplingParams

METHODS: dict[str, Reuse] = {"full": "off", "prefix": "exact", "kvshare": "similar"}
_SOURCES = {
    "kv": "known: its KV is reused, its encoder does not run",
    "features": "known: its encoder does not run",
    "encoder": "new: its encoder runs",
}
_NAMES = {"full": "full recompute", "prefix": "prefix caching", "kvshare": "KVShare"}


@dataclass(frozen=True, slots=True)
class Told:
    """One story as it went: the donor's output and the target's by method."""

    story: Story
    donor: RequestOutput
    outputs: dict[str, RequestOutput]
    ttft: dict[str, float]

    @property
    def same_answer(self) -> bool:
        return self.outputs["kvshare"].token_ids == self.outputs["full"].token_ids


def tell(llm: KVShare, story: Story, repeats: int, max_tokens: int) -> Told:
    """Serve a story: the donor once, the target by every method `repeats` times in turn."""
    salt = f"demo-{story.name}"
    donor = llm.chat(
        story.messages(story.donor),
        SamplingParams(max_tokens=max_tokens),
        RequestOptions(cache_salt=salt, reuse="exact"),
    )
    llm.flush()
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    outputs: dict[str, RequestOutput] = {}
    for repeat in range(repeats):
        for name, reuse in METHODS.items():
            output = llm.chat(
                story.messages(story.target),
                SamplingParams(max_tokens=max_tokens if repeat == 0 else 1),
                RequestOptions(cache_salt=salt, reuse=reuse, store=False),
            )
            times[name].append(output.metrics.ttft)
            outputs.setdefault(name, output)
    ttft = {name: statistics.median(values) for name, values in times.items()}
    return Told(story, donor, outputs, ttft)


def run(
    llm: KVShare,
    console: Console,
    repeats: int = 3,
    max_tokens: int = 24,
    picture: Path | None = None,
    stories: Sequence[Story] | None = None,
) -> dict[str, Any]:
    """Tell all stories, print them as they go, and return the same as data.

    Args:
        stories: those of words if None.
        picture: where to save the first story's coloured prompt as SVG, or None.
    """
    console.print(legend())
    told = []
    for one in _tell_all(
        llm, console, repeats, max_tokens, STORIES if stories is None else stories
    ):
        _print(llm, console, one)
        told.append(one)
    if picture:
        _save_picture(llm, told[0], picture)
    return {
        "kind": "demo",
        "model": llm.config.model,
        "stories": [_as_data(one) for one in told],
    }


def _tell_all(
    llm: KVShare, console: Console, repeats: int, max_tokens: int, stories: Sequence[Story]
) -> Iterator[Told]:
    for i, story in enumerate(stories, 1):
        with console.status(f"Story {i} of {len(stories)}: {story.name} ..."):
            one = tell(llm, story, repeats, max_tokens)
        yield one


def _print(llm: KVShare, console: Console, told: Told) -> None:
    story, shared = told.story, told.outputs["kvshare"]
    console.rule(f"[bold]{story.name}[/]: {story.about}", align="left")
    view = token_view(llm.tokenizer, shared.prompt_token_ids, shared.provenance)
    console.print(Panel(view, title="the new prompt", title_align="left"))
    for use in shared.provenance.media:
        console.print(f"[dim]{use.modality:15}:[/] {_SOURCES[use.source]} ({use.label})")
    console.print(f"[dim]earlier answer :[/] {escape(told.donor.text.strip())}")
    console.print(f"[dim]full recompute :[/] {escape(told.outputs['full'].text.strip())}")
    console.print(f"[dim]KVShare        :[/] {escape(shared.text.strip())}")
    table = Table()
    for heading in ("method", "first token", "times sooner", "tokens computed", "same answer"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, output in told.outputs.items():
        same = output.token_ids == told.outputs["full"].token_ids
        table.add_row(
            _NAMES[name],
            f"{1000 * told.ttft[name]:.0f} ms",
            f"{told.ttft['full'] / told.ttft[name]:.1f}",
            f"{output.provenance.recomputed} of {len(output.prompt_token_ids)}",
            "yes" if same else "[red]no[/]",
        )
    console.print(table)
    console.print()


def _save_picture(llm: KVShare, told: Told, path: Path) -> None:
    output = told.outputs["kvshare"]
    paper = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
    paper.print(legend())
    paper.print(token_view(llm.tokenizer, output.prompt_token_ids, output.provenance))
    svg = paper.export_svg(title=f"{told.story.name}: {told.story.about}")
    # A picture must not fetch fonts from anywhere; the reader's monospace font does.
    path.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def _as_data(told: Told) -> dict[str, Any]:
    return {
        "name": told.story.name,
        "tokens": len(told.outputs["full"].prompt_token_ids),
        "same_answer": told.same_answer,
        "methods": {
            name: {
                "ttft_s": told.ttft[name],
                "computed_tokens": output.provenance.recomputed,
                "answer": output.text,
            }
            for name, output in told.outputs.items()
        },
    }
