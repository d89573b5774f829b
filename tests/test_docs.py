"""The pages: links that lead somewhere, and tables that name what there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from kvshare_mm.apps.cli import app
from kvshare_mm.config import KVShareConfig
from kvshare_mm.reuse.plan import Decline

ROOT = Path(__file__).resolve().parents[1]
_PARTS = ("docs", "apps", "assets", "kernels", "kvshare_mm", "modalities")
PAGES = [ROOT / "README.md", *(p for part in _PARTS for p in sorted((ROOT / part).rglob("*.md")))]
_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
_LINK = re.compile(r"(?:\]\(|src(?:set)?=\"|href=\")([^)\"\s]+)")

# CI also runs the tests against the installed wheel, from a copy without the pages.
pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir(), reason="no source tree beside the tests"
)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def options() -> str:
    """The table of all options."""
    rows = []
    for name, field in KVShareConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "none" if default is None else f"`{default!r}`".replace("'", '"')
        rows.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_every_option_stands_on_its_page() -> None:
    assert options() in (ROOT / "docs" / "options.md").read_text("utf-8")


def test_every_reason_is_explained() -> None:
    page = (ROOT / "docs" / "provenance.md").read_text("utf-8")
    for reason in (
        *Decline,
        *("evicted", "corrupt", "io_error", "wrong_namespace", "newer_format", "edit_error"),
    ):
        assert f"\n| `{reason}` | " in page


def told(page: Path) -> Iterator[str]:
    """The commands of a page."""
    text = page.read_text("utf-8")
    lines = [x for block in _BLOCK.findall(text) for x in block.replace("\\\n", " ").splitlines()]
    codes = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    for line in (*lines, *codes):
        if found := re.match(r"(?:[\w./-]*/)?(kvshare .+)", line):
            yield found[1]


def check_command(line: str) -> None:
    """Whether there is such a command with such options; placeholders are as good as values."""
    command = typer.main.get_command(app)
    _, *words = shlex.split(line, comments=True)
    while words and (commands := getattr(command, "commands", None)):
        if not re.fullmatch(r"[a-z-]+", words[0]) or words[0].startswith("-"):
            break
        assert words[0] in commands, line
        command = commands[words.pop(0)]
    # Of a group, what one of its commands takes.
    takers = (command, *getattr(command, "commands", {}).values())
    options = [o for taker in takers for o in taker.params]
    known = {name for o in options for name in (*o.opts, *o.secondary_opts)} | {"--help"}
    for word in words:
        if word == "--":
            break
        assert not re.match(r"--?[a-z]", word) or word.partition("=")[0] in known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_those_there_are(page: Path) -> None:
    for line in told(page):
        check_command(line)


@pytest.mark.parametrize(
    "line", ["kvshare swerve x", "kvshare serve --sharing", "kvshare keys ad f"]
)
def test_others_are_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(line.replace("--sharing", "--share"))
