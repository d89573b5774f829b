"""The `kvshare` command on a tiny model: what people see, and what scripts read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest
import typer
from click.testing import Result
from rich.console import Console

import kvshare_mm
from kvshare_mm import KVShare, ModelLoadError, SamplingParams
from kvshare_mm.apps import chat as chat_app
from kvshare_mm.apps import showcase
from kvshare_mm.apps.cli import app
from kvshare_mm.apps.stories import STORIES, Story, picture_stories
from kvshare_mm.apps.token_view import legend

from .conftest import Run

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(8))
_DONOR = f"Laboratory report. Patient number 48210. {_ROWS} What is value 3?"
_TARGET = f"Laboratory report. Patient number 77. {_ROWS} What is value 3?"


@pytest.fixture
def store(run: Run, tiny_folder: Path, tmp_path: Path) -> Path:
    """A store folder with two donors, the second edited from the first."""
    folder = tmp_path / "store"
    for prompt in (_DONOR, _TARGET):
        done = run("generate", prompt, "--model", tiny_folder, "--store-dir", folder,
                   "--max-tokens", "4")  # fmt: skip
        assert done.exit_code == 0, done.output
    return folder


def check_refused(result: Result, *words: str) -> None:
    """One sentence that says what was wrong, and exit code 1."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    [line] = [x for x in result.output.splitlines() if x.startswith("Error:")]
    assert "Traceback" not in result.output
    for word in words:
        assert word in line


def commands(group: click.Group | Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_the_version(run: Run) -> None:
    assert run("--version").output == f"kvshare {kvshare_mm.__version__}\n"


@pytest.mark.parametrize("path", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_every_command_explains_itself(run: Run, path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    assert command.help
    assert command.help.split()[0] in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option) or hasattr(parameter, "opts"):
            assert getattr(parameter, "help", ""), f"{path}: {parameter.name} has no help"


def test_an_unknown_command_or_option(run: Run, tiny_folder: Path) -> None:
    for arguments in (["serve-me"], ["generate"], ["generate", "Hi", "--warp", "9"],
                      ["generate", "Hi", "--max-tokens", "0"], ["bench", "reuse"]):  # fmt: skip
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


# -- generate -----------------------------------------------------------------------------------


def test_generate(run: Run, tiny_folder: Path, open_llm: Callable[..., KVShare]) -> None:
    result = run("generate", _DONOR, "--model", tiny_folder, "--max-tokens", "6")
    assert result.exit_code == 0, result.output
    llm = open_llm()
    expected = llm.chat([{"role": "user", "content": _DONOR}], SamplingParams(max_tokens=6))
    n = len(expected.prompt_token_ids)
    assert expected.text[:3] in result.output
    line = f"{n} prompt tokens: 0 exact, 0 reused, {n} computed | nothing reused: no donor"
    assert f"{line} | first token after " in result.output


def test_generate_raw_and_from_standard_input(run: Run, tiny_folder: Path) -> None:
    options = ("--model", tiny_folder, "--max-tokens", "2")
    chat = run("generate", _DONOR, *options)
    raw = run("generate", _DONOR, "--raw", *options)
    piped = run("generate", "-", "--raw", *options, input=_DONOR)

    def tokens(result: Result) -> int:
        found = re.search(r"(\d+) prompt tokens", result.output)
        assert found, result.output
        return int(found[1])

    assert tokens(raw) == tokens(piped) < tokens(chat)


def test_generate_finds_what_an_earlier_run_stored(
    run: Run, tiny_folder: Path, store: Path
) -> None:
    result = run("generate", _TARGET, "--model", tiny_folder, "--store-dir", store,
                 "--max-tokens", "4")  # fmt: skip
    assert re.search(r"exact, [1-9]\d* reused, \d+ computed \| from [0-9a-f]{8} ", result.output)


def test_markup_in_prompts_and_answers_is_only_text(run: Run, tiny_folder: Path) -> None:
    prompt = "[/red] [bold]x[/nothing] " * 3
    result = run("generate", prompt, "--model", tiny_folder, "--max-tokens", "60")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Hi", "--model", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["Hi", "--model", "/nowhere/[/red]x"], ["/nowhere/[/red]x"]),
        (["", "--model", "TINY"], ["empty"]),
        (["  ", "--raw", "--model", "TINY"], ["prompt is empty"]),
        (["a b " * 300, "--model", "TINY"], ["context holds 512"]),
        (["Hi", "--model", "TINY", "--repair", "magic"], ["repair", "'magic'"]),
        (["Hi", "--model", "TINY", "--temperature", "1000"], ["temperature=1000"]),
        (["Hi", "--model", "TINY", "--store-dir", "/proc/kvshare"], ["/proc/kvshare"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_generate_says_what_is_wrong(
    run: Run, tiny_folder: Path, arguments: list[str], words: list[str]
) -> None:
    check_refused(run("generate", *(str(tiny_folder) if a == "TINY" else a for a in arguments)),
                  *words)  # fmt: skip


# -- chat ---------------------------------------------------------------------------------------


def test_chat(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModelLoadError("not installed")

    monkeypatch.setattr("kvshare_mm.modalities.embed.TextEmbedder", missing)
    questions = "What is the value?\nAnd now?\n/new\nWhat is the value?\n/quit\n"
    options = ("--model", tiny_folder, "--max-tokens", "4", "--system", "Answer.")
    result = run("chat", *options, input=questions)
    assert result.exit_code == 0, result.output
    lines = re.findall(r"(\d+) prompt tokens: (\d+) exact", result.output)
    prompts = [int(n) for n, _ in lines]
    assert len(prompts) == 3
    assert prompts[0] == prompts[2] < prompts[1]


def test_a_refused_question_does_not_end_a_chat(
    open_llm: Callable[..., KVShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    asked = ["a b " * 300, "What is the value?", EOFError]
    monkeypatch.setattr(console, "input", Mock(side_effect=asked))
    chat_app.talk(open_llm(), console, SamplingParams(max_tokens=3), None)
    text = console.export_text()
    assert "Error: the prompt has" in text
    assert text.count("prompt tokens:") == 1
    console.file.close()


# -- inspect ------------------------------------------------------------------------------------


def test_inspect(run: Run, store: Path) -> None:
    result = run("inspect", store)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("2 donors, ")
    numbers = re.search(r"(\d+) tokens held, (\d+) if each were stored whole", result.output)
    assert numbers
    assert 0 < int(numbers[1]) < int(numbers[2])
    for heading in ("donor", "model", "tokens", "owned", "exact", "parent", "created"):
        assert heading in result.output
    assert len(re.findall(r"20\d\d-\d\d-\d\d", result.output)) == 2
    limited = run("inspect", store, "--limit", "1")
    assert len(re.findall(r"20\d\d-\d\d-\d\d", limited.output)) == 1


def test_inspect_draws_the_tree(run: Run, store: Path) -> None:
    result = run("inspect", store, "--tree")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    nodes = [line for line in lines if "tokens, owns" in line]
    assert len(nodes) == 2
    depth = [len(line) - len(line.lstrip("│├└─ ")) for line in nodes]
    assert depth[0] < depth[1]  # the second was edited from the first


def test_inspect_changes_nothing(run: Run, store: Path) -> None:
    (store / "kv" / "damaged.kvnode").write_bytes(b"no node")
    (store / "kv" / "x.kvnode.0f.tmp").write_bytes(b"what a server writes now")
    before = {p.name: p.read_bytes() for p in (store / "kv").iterdir()}
    assert "1 files cannot be read" in run("inspect", store).output
    assert {p.name: p.read_bytes() for p in (store / "kv").iterdir()} == before


def test_store_verify_and_repair(run: Run, store: Path) -> None:
    whole = run("store", "verify", store)
    assert (whole.exit_code, "Nothing is wrong" in whole.output) == (0, True), whole.output
    (store / "kv" / "damaged.kvnode").write_bytes(b"no node")
    wrong = run("store", "verify", store, "--json")
    report = json.loads(wrong.output)
    assert (wrong.exit_code, report["ok"], report["donors"]) == (1, False, 2)
    assert [p["kind"] for p in report["problems"]] == ["damaged"]
    assert "store repair" in run("store", "verify", store).output
    mended = run("store", "repair", store, "--quarantine", store / "aside")
    assert mended.exit_code == 0, mended.output
    assert "1 files moved" in mended.output
    assert (store / "aside" / "kv" / "damaged.kvnode").exists()
    assert run("store", "verify", store).exit_code == 0
    assert "not a store folder" in run("store", "repair", store / "kv").output


def test_inspect_an_empty_store(run: Run, tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    for flags in ([], ["--tree"]):
        result = run("inspect", tmp_path, *flags)
        assert result.exit_code == 0, result.output
        assert result.output.startswith("0 donors")


def test_inspect_what_is_no_store(run: Run, tmp_path: Path) -> None:
    check_refused(run("inspect", tmp_path), "is not a store folder")
    check_refused(run("inspect", tmp_path / "nowhere"), "is not a store folder")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("{}")
    for command in (("bench", "reuse", "--pairs", file), ("demo",)):
        result = run(*command, "--model", "/nowhere", "--json", file / "report.json")
        assert result.exit_code == 2
        assert "cannot write" in result.output
        assert "/nowhere" not in result.output


# -- demo ---------------------------------------------------------------------------------------


def test_demo(run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stories = (
        Story("report", "the same with other numbers", _DONOR, _TARGET, right=""),
        Story("fox", "nothing alike", "A fox jumps. " * 12, "number [/red] " * 20, right="unsaid"),
    )
    monkeypatch.setattr("kvshare_mm.apps.showcase.STORIES", stories)
    # The stories with pictures have tests of their own.
    monkeypatch.setattr("kvshare_mm.models.loader.is_installed", lambda name: False)
    out = tmp_path / "demo.json"
    result = run("demo", "--model", tiny_folder, "--repeats", "2", "--max-tokens", "40",
                 "--json", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("report", "fox", "prefix caching", "KVShare"):
        assert text in result.output
    assert "number [/red]" not in result.output
    report = json.loads(out.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert report["model"] == str(tiny_folder) and report["machine"]["cores"] >= 1
    assert [story["name"] for story in report["stories"]] == ["report", "fox"]
    for story in report["stories"]:
        assert all(method["ttft_s"] > 0 for method in story["methods"].values())
        prefix, kvshare = story["methods"].values()
        assert kvshare["computed_tokens"] <= prefix["computed_tokens"] <= story["tokens"]
        assert story["same_answer"] == (kvshare["answer"] == prefix["answer"])
    assert [story["answer"] for story in report["stories"]] == ["right", "wrong"]
    methods = report["stories"][0]["methods"]
    assert methods["kvshare"]["computed_tokens"] < methods["prefix"]["computed_tokens"]


def test_demo_says_what_is_wrong(run: Run, tiny_folder: Path) -> None:
    check_refused(run("demo", "--model", tiny_folder), "context holds 512")  # its stories are long


def test_demo_shows_prompts_where_they_are_asked_for(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story("fox", "nothing alike", "The quick brown fox jumps.", "number [/red]", right="")
    monkeypatch.setattr("kvshare_mm.apps.showcase.STORIES", (story,))
    monkeypatch.setattr("kvshare_mm.models.loader.is_installed", lambda name: False)
    options = ["--repeats", "1", "--max-tokens", "2", "--show-prompts"]
    result = run("demo", "--model", tiny_folder, *options)
    assert result.exit_code == 0, result.output
    assert "number [/red]" in result.output
    assert "identical beginning" in result.output
    *_, heading, row = result.output.splitlines()
    assert heading in showcase.HEADING.plain and row.startswith("fox ")


def test_the_demos_rows_stand_below_their_headings() -> None:
    method = {"ttft_s": 9.999, "computed_tokens": 9999}
    heading = showcase.HEADING.plain.splitlines()[-1]
    for story in (*STORIES, *picture_stories()):
        data = {"name": story.name, "tokens": 9999, "answer": "donor's",
                "methods": {"prefix": method, "kvshare": method}}  # fmt: skip
        row = showcase.row(data).plain
        assert len(row) < 80
        assert row.startswith(f"{story.name} ") and row.index("donor's") == heading.index("answer")
        for name, cost in (("prefix caching", row.index("ms")), ("KVShare", row.rindex("ms"))):
            assert cost + len("ms") == heading.index(name) + len(name)  # aligned to the right
    assert len(legend()) <= 80


@pytest.mark.parametrize(
    "command",
    [
        "serve smolm2",
        "desk smolm2",
        "generate Hi --model smolm2",
        "bench frontier --pairs p.jsonl --model smolm2",
    ],
)
def test_who_misspells_a_model_does_not_wait(command: str) -> None:
    """Importing torch takes seconds."""
    ask = (
        "import sys\nfrom typer.testing import CliRunner\nfrom kvshare_mm.apps.cli import app\n"
        f"done = CliRunner().invoke(app, {command.split()!r})\n"
        "print(done.exit_code, 'torch' in sys.modules, done.output)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 False")
    assert "did you mean smollm2?" in done.stdout
