"""An audit's report for people: in the terminal, and as one HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvshare_mm.apps.audit.compare import Piece, marked
from kvshare_mm.apps.audit.replay import AGAIN, BOUND, FULL, PREFIX
from kvshare_mm.apps.audit.report import short
from kvshare_mm.errors import ConfigError

_LABELS = {PREFIX: "prefix caching", FULL: "in full"}
_NOTES = {
    "cut": "differ behind the other's longest length alone.",
    "by_rounding": "of the changed change by rounding, too: in full, but in other pieces.",
}
_SHOWN_FAMILIES, _SHOWN_ANSWERS, _LABEL = 10, 3, 60

Rows = list[list[str]]


def verdict(report: dict[str, Any]) -> list[str]:
    """What was found, in sentences."""
    lines = []
    for name, way in report["ways"].items():
        counts = {key: n for key, n in way.items() if key in _NOTES and n}
        notes = "".join(f" {n} {_NOTES[key]}" for key, n in counts.items())
        if name not in _LABELS:
            lines.append(
                f"{name}: {way['same']} of {way['answers']} answers are the same, letter by letter;"
                f" {way['changed']} changed, a number in {way['numbers']}, a name in "
                f"{way['names']}.{notes} {way['less_than_prefix']} requests took over more than "
                "prefix caching can."
            )
    prefix = report["ways"][PREFIX]
    apart = prefix["answers"] - prefix["same"]
    lines.append(f"Prefix caching, which differs by rounding alone, changed {apart}.")
    if n := report["sampled"]:
        lines.append(f"{n} requests have a temperature above 0: they were asked greedily, as all.")
    return lines


def ways(report: dict[str, Any]) -> Rows:
    """What each replay gave and took, headings first."""
    bounds = any(name.startswith(BOUND) for name in report["ways"])
    first = BOUND.strip() if bounds else ""
    rows = [[first, "same", "changed", "number", "name", "computed", "first token", "sooner"]]
    for name, way in report["ways"].items():
        facts = [str(way[key]) for key in ("same", "changed", "numbers", "names")]
        ttft = f"{1000 * way['ttft_s']['mean']:.0f} ms"
        label = _LABELS.get(name, name.removeprefix(BOUND))
        rows.append([label, *facts, _share(way), ttft, _times(way)])
    return rows


def families(report: dict[str, Any]) -> Rows:
    """What became of each family, headings first."""
    rows = [["first", "requests", "same", "changed facts", "computed", "sooner", "e.g."]]
    for f in report["families"]:
        counts = (str(f[key]) for key in ("answers", "same", "facts"))
        example = short(f["question"], _LABEL)
        rows.append([f"line {f['line']}", *counts, _share(f), _times(f), example])
    return rows


def changed(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every changed answer once, with the ways that gave it."""
    for request in report["requests"]:
        by_text: dict[str, list[str]] = {}
        for name in report["ways"]:
            if request["ways"][name]["outcome"] == "changed" and name != PREFIX:
                by_text.setdefault(request["ways"][name]["text"], []).append(name)
        for text, names in by_text.items():
            reply, full = request["ways"][names[0]], request["ways"][FULL]["text"]
            facts = [
                (what, *(", ".join(words) or "-" for words in reply[what]))
                for what in ("numbers", "names")
                if reply[what]
            ]
            again = request["ways"][AGAIN]["text"] != full
            by = names[0] + "".join(f", {name.removeprefix(BOUND)}" for name in names[1:])
            yield {**request, "by": by, "pair": marked(full, text), "facts": facts,
                   "by_rounding": again}  # fmt: skip


def in_terminal(report: dict[str, Any], console: Console) -> None:
    """The verdict, the tables, and a few of the changed answers side by side."""
    for line in verdict(report):
        console.print(escape(line), soft_wrap=True, highlight=False)
    console.print(_table(ways(report)))
    heading, *rows = families(report)
    console.print(f"Families, {escape(report['families_of'])}:", highlight=False)
    console.print(_table([heading, *rows[:_SHOWN_FAMILIES]]))
    if len(rows) > _SHOWN_FAMILIES:
        console.print(f"... and {len(rows) - _SHOWN_FAMILIES} more families", style="dim")
    answers = list(changed(report))
    for answer in answers[:_SHOWN_ANSWERS]:
        console.print(_side_by_side(answer))
    if (more := len(answers) - _SHOWN_ANSWERS) > 0:
        console.print(f"... and {more} more changed answers: --html shows all", style="dim")
    for why, count in _reasons(report):
        console.print(f"[red]{count} not answered:[/] {escape(why)}", soft_wrap=True)


def page(report: dict[str, Any]) -> str:
    """One HTML page that needs nothing from outside. Raises ConfigError without jinja2."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ConfigError("--html needs jinja2: pip install 'kvshare-mm[bench]'") from error
    # Logs hold strangers' text.
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True)
    return environment.get_template("audit.html.j2").render(
        report=report,
        verdict=verdict(report),
        tables=[
            ("What each replay gave and took", ways(report)),
            (f"Families, {report['families_of']}", families(report)),
        ],
        changed=list(changed(report)),
        reasons=_reasons(report),
    )


def _share(figures: dict[str, Any]) -> str:
    return f"{figures['computed'] / max(1, figures['prompt_tokens']):.0%}"


def _times(figures: dict[str, Any]) -> str:
    times = figures["times_sooner_than_prefix"]
    return "" if times is None else f"{times:.1f}x"


def _reasons(report: dict[str, Any]) -> list[tuple[str, int]]:
    """Why requests were not answered, the most frequent first."""
    return Counter(refused["why"] for refused in report["refused"]).most_common()


def _table(rows: Rows) -> Table:
    heading, *rest = rows
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, name in enumerate(heading):
        words = i == 0 or name == "e.g."
        table.add_column(name, justify="left" if words else "right", no_wrap=name != "e.g.")
    for row in rest:
        table.add_row(*map(escape, row))
    return table


def _side_by_side(answer: dict[str, Any]) -> Table:
    question = Text(f"line {answer['line']}: {answer['question']}", style="dim")
    table = Table(title=question, title_justify="left", expand=True, show_lines=True)
    for name in (_LABELS[FULL], answer["by"]):
        table.add_column(name, ratio=1)
    table.add_row(*map(_text, answer["pair"]))
    for what, *sides in answer["facts"]:
        table.add_row(*(Text(f"{what}: {words}") for words in sides))
    return table


def _text(pieces: list[Piece]) -> Text:
    # Escape sequences of a stranger's text stay out of the terminal: rich strips control codes.
    return Text.assemble(*((text, "bold reverse" if differs else "") for text, differs in pieces))
