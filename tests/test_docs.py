"""The pages: links that lead somewhere, and tables that name what there is."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from kvshare_mm.apps.cli import app
from kvshare_mm.config import KVShareConfig
from kvshare_mm.reuse.plan import Decline
from kvshare_mm.vllm import kv_transfer_config

ROOT = Path(__file__).resolve().parents[1]
_PARTS = ("docs", "apps", "assets", "kernels", "kvshare_mm", "modalities")
PAGES = [ROOT / "README.md", *(p for part in _PARTS for p in sorted((ROOT / part).rglob("*.md")))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
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


def blocks(page: Path, language: str | None = None) -> list[str]:
    """Code of a page: all, or that in one language ("": none named)."""
    found = _BLOCK.findall(page.read_text("utf-8"))
    return [code for named, code in found if language is None or named == language]


def commands(lines: Iterable[str]) -> list[str]:
    found = (re.match(r"(?:\$ )?(?:[\w./-]*/)?(kvshare .+)", line) for line in lines)
    return [match[1] for match in found if match]


def typed(page: Path) -> list[str]:
    """The commands in a page's blocks, as somebody would type them."""
    return commands(x for b in blocks(page) for x in b.replace("\\\n", " ").splitlines())


def named(page: Path) -> list[str]:
    """The commands in a page's sentences; they may leave out what the sentence is not about."""
    codes = re.findall(r"`([^`]+)`", prose(page))
    return commands(" ".join(code.split()) for code in codes)


@cache
def whole() -> Any:
    """All of `kvshare`, as typer has it."""
    return typer.main.get_command(app)


def found(line: str) -> tuple[Any, list[str]]:
    """The command that a line begins with, and the words behind it."""
    command = whole()
    _, *words = shlex.split(line, comments=True)
    while words and (commands := getattr(command, "commands", None)):
        if not re.fullmatch(r"[a-z-]+", words[0]) or words[0].startswith("-"):
            break
        assert words[0] in commands, line
        command = commands[words.pop(0)]
    return command, words


def check_command(line: str) -> None:
    """Whether there is such a command with such options; placeholders are as good as values."""
    command, words = found(line)
    # Of a group, what one of its commands takes.
    takers = (command, *getattr(command, "commands", {}).values())
    options = [o for taker in takers for o in taker.params]
    known = {name for o in options for name in (*o.opts, *o.secondary_opts)} | {"--help"}
    for word in words:
        if word == "--":
            break
        assert not re.match(r"--?[a-z]", word) or word.partition("=")[0] in known, line


def check_typed(line: str) -> None:
    """Whether the command takes the whole line; what kind of value is given is not looked at."""
    command, words = found(line)
    context = command.context_class(command, info_name=command.name)
    try:
        given, left, _ = command.make_parser(context).parse_args(words)
    except Exception as error:  # typer's own click has no public name
        raise AssertionError(f"{line}: {error}") from error
    assert not left, line
    missing = [o.name for o in command.params if o.required and given.get(o.name) is None]
    assert not missing or given.get("help"), f"{line}: no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_those_there_are(page: Path) -> None:
    for line in typed(page):
        check_typed(line)
    for line in named(page):
        check_command(line)


@pytest.mark.parametrize("line", ["kvshare swerve x", "kvshare serve --share", "kvshare keys ad f"])
def test_others_are_noticed(line: str) -> None:
    for check in (check_command, check_typed):
        with pytest.raises(AssertionError):
            check(line)


@pytest.mark.parametrize(
    "line",
    ["kvshare route x", "kvshare serve a --port", "kvshare audit", "kvshare keys add --tenant t"],
)
def test_lines_that_would_not_run_are_noticed(line: str) -> None:
    check_command(line)
    with pytest.raises(AssertionError):
        check_typed(line)


def test_there_are_commands_to_check() -> None:
    assert sum(len(typed(page)) for page in PAGES) > 30
    assert sum(len(named(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_python_imports_is_there(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kvshare_mm"):
                module = importlib.import_module(str(node.module))
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []
    for name in re.findall(r"python -m (kvshare_mm[\w.]*)", page.read_text("utf-8")):
        assert importlib.util.find_spec(name) is not None, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_of_make_are_those_there_are(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    text = page.read_text("utf-8")
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M)) <= targets


def test_the_plain_line_for_vllm_says_what_the_function_says() -> None:
    page = ROOT / "kvshare_mm" / "vllm" / "README.md"
    [line] = [code for code in blocks(page, "") if code.startswith("vllm serve")]
    words = shlex.split(line.replace("\\\n", " "))
    config = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert config == kv_transfer_config({"max_divergence": 0.01})


def test_what_is_installed_by_extras_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = set(declared["project"]["optional-dependencies"])
    asked = re.compile(r"pip install[^\n`]*?(?:kvshare-mm|\.)\[([a-z,]+)\]")
    for page in PAGES:
        for names in asked.findall(page.read_text("utf-8")):
            assert set(names.split(",")) <= extras, (page, names)
