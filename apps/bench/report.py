"""`kvshare bench report`: result files of a folder as one page, and as figures for the README."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvshare_mm.apps.bench.figures import Drawn, figure_of, quality_figure
from kvshare_mm.apps.bench.jsonl import read_text
from kvshare_mm.apps.bench.tables import TABLES, Rows
from kvshare_mm.apps.bench.theme import model_label
from kvshare_mm.errors import ConfigError

logger = logging.getLogger(__name__)

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page.

    Attributes:
        title: its heading.
        source: the result file's name.
        machine: what it was measured on, in one line.
        command: that measured it, or empty.
        rows: a table, its headings first.
        figure: or None.
    """

    title: str
    source: str
    machine: str
    command: str
    rows: Rows
    figure: Drawn | None


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by file name without ending, in order of name.

    Files of other kinds are left out.

    Raises:
        ConfigError: there is no such folder, a file is no JSON, or none is a result.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of results")
    results = {}
    for path in sorted(folder.glob("*.json")):
        text = read_text(path)
        if not text.strip():
            logger.warning("%s is empty: its run is not complete", path)
            continue
        try:
            report = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        if isinstance(report, dict) and report.get("kind") in TABLES:
            results[path.stem] = report
        else:
            logger.warning("%s is no result that has a place in the report", path)
    if not results:
        raise ConfigError(f"{folder} has no results of {', '.join(sorted(TABLES))}")
    return {**results, **_of_all_models(results)}


def sections(results: dict[str, dict[str, Any]]) -> list[Section]:
    """Parts of the page; tasks of one model share a figure, which stands with the first of them."""
    found = []
    together = _quality_figures(results)
    for name, report in results.items():
        kind = TABLES[report["kind"]]
        figure = together.get(name) if report["kind"] == "quality" else figure_of(name, report)
        command = report.get("command", "")
        for table, drawn in ((kind, figure), *((part, None) for part in kind.parts.values())):
            heading, rows = table.heading(report), table.rows(report)
            found.append(Section(heading, name, _machine(report), command, rows, drawn))
    return found


def page(parts: Sequence[Section]) -> str:
    """One HTML page that needs nothing from outside. Raises ConfigError without jinja2."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ConfigError("the report needs jinja2: pip install 'kvshare-mm[bench]'") from error
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True)
    return environment.get_template(_TEMPLATE).render(sections=parts)


def write_figures(parts: Sequence[Section], folder: Path) -> list[Path]:
    """Every figure as ``name-light.svg`` and ``name-dark.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in (part.figure for part in parts if part.figure):
        for theme, text in (("light", figure.light), ("dark", figure.dark)):
            path = folder / f"{figure.name}-{theme}.svg"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def _of_all_models(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Frontiers of several models on the same prompts, as a result of its own."""
    frontiers = [report for report in results.values() if report["kind"] == "frontier"]
    if not frontiers:
        return {}
    kinds = [report.get("what", "similar prompts") for report in frontiers]
    (what, count), *_ = Counter(kinds).most_common(1)
    reports = [report for report, kind in zip(frontiers, kinds, strict=True) if kind == what]
    command = ", ".join(filter(None, (report.get("command") for report in reports)))
    together = {"kind": "models", "what": what, "reports": reports, "command": command}
    return {"frontier-models": together} if count > 1 else {}


def _quality_figures(results: dict[str, dict[str, Any]]) -> dict[str, Drawn]:
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for name, report in results.items():
        if report["kind"] == "quality":
            by_model.setdefault(report["model"], {})[name] = report
    return {
        next(iter(those)): quality_figure(f"quality-{_slug(model)}", list(those.values()))
        for model, those in by_model.items()
    }


def _slug(model: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", model_label(model).lower()).strip("-")


def _machine(report: dict[str, Any]) -> str:
    machine = report.get("machine")
    if not machine:
        return ""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}, transformers {machine['transformers']}"
