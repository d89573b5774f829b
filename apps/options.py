"""Options of commands that are fields of `KVShareConfig`: its defaults, bounds and descriptions."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvshare_mm.apps.terminal import plain_errors
from kvshare_mm.config import KVShareConfig
from kvshare_mm.models.names import refuse_unknown

Values = dict[str, Any]
"""Fields of a `KVShareConfig`, by name."""

_BOUNDS = {"ge": "min", "le": "max"}  # pydantic's, typer's
_UNITS = {"GiB": 2**30, "MiB": 2**20}


@dataclass(frozen=True, slots=True)
class _Flag:
    """How a field is written on the command line.

    Attributes:
        name: of the parameter: ``max_queue`` is ``--max-queue``.
        unit: what the number is in where the field has bytes.
    """

    name: str
    unit: str | None = None


# Fields that are not called, or not counted, as they are there.
_FLAGS = {
    "host_bytes": _Flag("host_gib", "GiB"),
    "disk_bytes": _Flag("disk_gib", "GiB"),
    "max_media_bytes": _Flag("max_media_mib", "MiB"),
    "media_deadline_s": _Flag("decode_timeout"),
}


def flag_name(field: str) -> str:
    """What a field's option is called: ``max_queue`` is ``--max-queue``."""
    return _FLAGS[field].name if field in _FLAGS else field


FIELDS = {flag_name(field): field for field in KVShareConfig.model_fields}
"""Fields by the names of their options."""


def config_values(options: Mapping[str, Any]) -> Values:
    """The fields of `KVShareConfig` among a command's options."""
    return {FIELDS[n]: _in_bytes(FIELDS[n], value) for n, value in options.items() if n in FIELDS}


def described(field: str) -> str:
    """What an option is, in words."""
    return str(KVShareConfig.model_fields[field].description)


def between(least: float, most: float, words: str) -> Any:
    """An option with bounds; those of older releases of typer let NaN pass."""
    return typer.Option(min=least, max=most, callback=_no_nan, help=words)


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise typer.BadParameter(f"{value} is no number.")
    return value


def config_options(
    panels: Mapping[str | None, tuple[str, ...]], **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each of some fields, in the place of its parameter `config`.

    Args:
        panels: the fields, by the heading that they stand under in the command's help.
        defaults: of fields that a command begins with otherwise, as in `KVShareConfig`.

    Returns:
        A decorator of a command that takes their values as ``config: Values``.
    """
    shown = {field: panel for panel, fields in panels.items() for field in fields}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == "config":
                parameters += [_parameter(f, panel, defaults) for f, panel in shown.items()]
            else:
                parameters.append(parameter)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in map(flag_name, shown)}
            if "model" in given:
                with plain_errors():
                    refuse_unknown(given["model"])
            command(config=config_values(given), **values)

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        return run

    return decorate


def _in_bytes(field: str, value: Any) -> Any:
    unit = _FLAGS[field].unit if field in _FLAGS else None
    return value if unit is None or value is None else int(value * _UNITS[unit])


def _parameter(field: str, panel: str | None, defaults: Values) -> inspect.Parameter:
    info = KVShareConfig.model_fields[field]
    name, unit = flag_name(field), _FLAGS[field].unit if field in _FLAGS else None
    default, kind, words = defaults.get(field, info.default), info.annotation, described(field)
    bounds: dict[str, Any] = {}
    if unit is not None:
        # Its bounds are in bytes: KVShareConfig checks them.
        kind, words = (float | None if default is None else float), f"{words}; in {unit}"
        default = None if default is None else default / _UNITS[unit]
    else:
        for bound in info.metadata:
            bounds |= {_BOUNDS[at]: getattr(bound, at) for at in _BOUNDS if hasattr(bound, at)}
    option = typer.Option(help=words, rich_help_panel=panel, **bounds)
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=default,
        annotation=Annotated[kind, option],
    )
