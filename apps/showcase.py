"""`kvshare demo`: stories, each served with prefix caching and with KVShare."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from kvshare_mm.apps.stories import STORIES, Story
from kvshare_mm.apps.token_view import legend, token_view
from kvshare_mm.config import RequestOptions, Reuse
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.sampling import SamplingParams

METHODS: dict[str, Reuse] = {"prefix": "exact", "kvshare": "similar"}
_SOURCES = {
    "kv": "known: its KV is reused, its encoder does not run",
    "features": "known: its encoder does not run",
    "encoder": "new: its encoder runs",
}
_ROW = "{:<12} {:>7} {:>15} {:>14} {:>7}  {}"
# All stories, with the command and a prompt above and below, fit one screen of 80x24.
HEADING = Text.assemble(
    ("Tokens computed, time to the first token:\n", ""),
    (_ROW.format("story", "prompt", "prefix caching", "KVShare", "sooner", "answer"), "bold"),
)


@dataclass(frozen=True, slots=True)
class Told:
    """One story as it went: the donor's output and the target's by method."""

    story: Story
    donor: RequestOutput
    outputs: dict[str, RequestOutput]
    ttft: dict[str, float]

    @property
    def same_answer(self) -> bool:
        """Whether KVShare says what prefix caching does, which is what the model says in full."""
        return self.outputs["kvshare"].token_ids == self.outputs["prefix"].token_ids

    @property
    def verdict(self) -> str:
        """What became of the answer that KVShare's is: ``right``, ``donor's`` or ``wrong``."""
        text = self.outputs["kvshare"].text
        if self.story.before and self.story.before in text:
            return "donor's"
        return "right" if self.story.right in text else "wrong"


def tell(llm: KVShare, story: Story, repeats: int, max_tokens: int) -> Told:
    """Serve a story: the donor, then the target with both methods, `repeats` times in turn.

    The first time they answer; then their first token alone is timed again, and the sooner counts.
    """
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
                SamplingParams(max_tokens=1 if repeat else max_tokens),
                RequestOptions(cache_salt=salt, reuse=reuse, store=False),
            )
            times[name].append(output.metrics.ttft)
            outputs.setdefault(name, output)
    return Told(story, donor, outputs, {name: min(values) for name, values in times.items()})


def run(
    llm: KVShare,
    console: Console,
    repeats: int = 2,
    max_tokens: int = 24,
    picture: Path | None = None,
    stories: Sequence[Story] | None = None,
    show_prompts: bool = False,
) -> dict[str, Any]:
    """Tell all stories, print them as they go, and return the same as data.

    Args:
        stories: those of words if None.
        picture: where to save the first story's coloured prompt as SVG, or None.
        show_prompts: print the prompts too, coloured by where their KV came from.
    """
    told = []
    for one in _tell_all(
        llm, console, repeats, max_tokens, STORIES if stories is None else stories
    ):
        if show_prompts:
            _print_prompt(llm, console, one)
        _print(console, one)
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


def _print_prompt(llm: KVShare, console: Console, told: Told) -> None:
    shared = told.outputs["kvshare"]
    console.print()
    console.print(legend())
    view = token_view(llm.tokenizer, shared.prompt_token_ids, shared.provenance)
    console.print(Panel(view, title="the new prompt", title_align="left"))
    console.print(f"Answer to the earlier one: {_line(told.donor)}", markup=False, highlight=False)


def _print(console: Console, told: Told) -> None:
    """A row of the table, and a line on what was asked and answered, cut at the border."""
    shared = told.outputs["kvshare"]
    lines = [row(_as_data(told)), Text(f"  {told.story.about}: ", "dim").append(_line(shared), "")]
    if not told.same_answer:
        lines.append(Text(f"  prefix caching: {_line(told.outputs['prefix'])}", "red"))
    lines += (Text(f"  {what}", "dim") for what in _media(shared))
    for line in lines:
        console.print(line, no_wrap=True, overflow="ellipsis")


def _media(output: RequestOutput) -> Iterator[str]:
    """What became of the pictures and sounds, those of the same fate in one line."""
    for kind in dict.fromkeys((use.modality, use.source) for use in output.provenance.media):
        yield f"{kind[0]} {_SOURCES[kind[1]]}"


def _line(output: RequestOutput) -> str:
    return " ".join(output.text.split())


def row(story: Mapping[str, Any]) -> Text:
    """A story (one of `run`'s) beside prefix caching, in less than 80 columns."""
    prefix, kvshare = story["methods"]["prefix"], story["methods"]["kvshare"]
    text = Text(
        _ROW.format(
            story["name"],
            story["tokens"],
            _cost(prefix),
            _cost(kvshare),
            f"{prefix['ttft_s'] / kvshare['ttft_s']:.1f}x",
            story["answer"],
        )
    )
    text.stylize("bold", 0, len(story["name"]))
    text.stylize("green" if story["answer"] == "right" else "red", -len(story["answer"]))
    return text


def _cost(method: Mapping[str, Any]) -> str:
    return f"{method['computed_tokens']}, {1000 * method['ttft_s']:.0f} ms"


def _save_picture(llm: KVShare, told: Told, path: Path) -> None:
    output = told.outputs["kvshare"]
    paper = Console(record=True, width=108, file=io.StringIO(), force_terminal=True)
    paper.print(legend())
    paper.print(token_view(llm.tokenizer, output.prompt_token_ids, output.provenance))
    svg = paper.export_svg(title=f"{told.story.name}: {told.story.about}")
    # A picture must not fetch fonts from anywhere; the reader's monospace font does.
    path.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def _as_data(told: Told) -> dict[str, Any]:
    return {
        "name": told.story.name,
        "tokens": len(told.outputs["prefix"].prompt_token_ids),
        "same_answer": told.same_answer,
        "answer": told.verdict,
        "methods": {
            name: {
                "ttft_s": told.ttft[name],
                "computed_tokens": output.provenance.recomputed,
                "answer": output.text,
            }
            for name, output in told.outputs.items()
        },
    }
