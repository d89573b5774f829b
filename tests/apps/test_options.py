"""Options of commands that are fields of the configuration: one default and one description."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from kvshare_mm.apps.cli import app
from kvshare_mm.apps.options import FIELDS, Values, config_options, config_values, described
from kvshare_mm.apps.simulate import simulate
from kvshare_mm.apps.size import size
from kvshare_mm.config import KVShareConfig

from .conftest import Run

_COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# A server decodes what strangers send.
_STRICTER = {"max_media_bytes": 20 << 20, "media_workers": 2}


@pytest.mark.parametrize("command", ["demo", "generate", "chat", "serve"])
def test_an_option_says_what_its_field_says(command: str) -> None:
    options = [p for p in _COMMANDS[command].params if p.name in FIELDS and p.name != "model"]
    for option in options:
        field = FIELDS[option.name]
        assert option.help.partition("; in ")[0] == described(field)
        default = _STRICTER.get(field, KVShareConfig.model_fields[field].default)
        assert config_values({option.name: option.default}) == {field: default}
    assert len(options) == {"demo": 0, "generate": 3, "chat": 3, "serve": 25}[command]


_ASKED = {simulate: ["simulate"], size: ["size", "--model", "none", "--requests-per-day", "9"]}
_NUMBERS = {
    (function, f"--{name.replace('_', '-')}"): get_args(parameter.annotation)[1]
    for function in _ASKED
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
    if get_args(parameter.annotation)[0] in (int, float)
}


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "-1", "1e400", pytest.param("9" * 5000, id="huge")]
)
@pytest.mark.parametrize(("function", "option"), _NUMBERS)
def test_a_number_that_makes_no_sense_is_refused(
    run: Run, function: Callable[..., None], option: str, value: str
) -> None:
    result = run(*_ASKED[function], option, value)
    assert result.exit_code == 2
    assert f"'{option}'" in result.output and "Traceback" not in result.output


def test_they_are_all_bounded() -> None:
    assert len(_NUMBERS) == 20
    assert {name for name, kind in _NUMBERS.items() if kind.max is None} == {(simulate, "--seed")}
    assert _NUMBERS[simulate, "--requests"].max >= 10**9


def _called(*words: str) -> Values:
    called: list[Values] = []
    app = typer.Typer()

    @app.command()
    @config_options({None: ("max_queue", "host_bytes", "reuse")}, max_queue=7)
    def command(config: Values, other: int = 1) -> None:
        called.append({**config, "other": other})

    result = CliRunner().invoke(app, words)
    return called[0] if called else {"refused": result.exit_code}


def test_a_command_gets_the_fields_that_its_options_are() -> None:
    plain = {"max_queue": 7, "host_bytes": None, "reuse": "similar", "other": 1}
    assert _called() == plain
    assert _called("--host-gib", "0.5", "--reuse", "exact", "--other", "2") == {
        **plain, "host_bytes": 1 << 29, "reuse": "exact", "other": 2
    }  # fmt: skip


def test_a_field_keeps_its_bounds_and_choices() -> None:
    assert _called("--max-queue", "0") == {"refused": 2}
    assert _called("--reuse", "perhaps") == {"refused": 2}


def test_options_that_are_no_fields_are_left_apart() -> None:
    assert config_values({"scope": "tenant", "port": 1, "reuse": "off"}) == {"reuse": "off"}


def test_none_turns_search_by_meaning_off() -> None:
    assert KVShareConfig.of(embedder="none", media_embedder="none").embedder is None


def test_an_option_by_its_old_name_is_told_the_new_one() -> None:
    from kvshare_mm.apps.cli import app as kvshare

    result = CliRunner().invoke(kvshare, ["serve", "--sharing", "tenant"])
    assert result.exit_code == 2
    assert "--scope" in result.output
