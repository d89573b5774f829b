"""Who imports whom: dependencies between packages go one way.

Imports are read from the source, those inside functions and under ``TYPE_CHECKING`` too. A folder
is a package; a module at the top of the core or of the apps stands for itself.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).parents[1]
# Folders, and what they are called once installed.
FOLDERS = {"kvshare_mm": "kvshare_mm"} | {
    name: f"kvshare_mm.{name}" for name in ("apps", "assets", "kernels", "modalities")
}
# Imports that break a rule, and why they may.
EXCEPTIONS = {
    # `kvshare serve --ui` shows the desk in the server that the desk itself is made for.
    ("kvshare_mm.apps.server.run", "kvshare_mm.apps.desk.mount"),
}

# CI also runs the tests against the installed wheel, from a copy without the sources.
pytestmark = pytest.mark.skipif(
    not (ROOT / "kvshare_mm").is_dir(), reason="no source tree beside the tests"
)

Kind = Literal["at import", "in a function", "for types"]


@dataclass(frozen=True, slots=True)
class Import:
    """One import: which module has it in which line, and when it is carried out."""

    by: str
    of: str
    kind: Kind
    line: int

    def __str__(self) -> str:
        return f"{self.kind}: {self.by}:{self.line} imports {self.of}"


def modules() -> dict[str, Path]:
    """Every module of the package by its name once installed."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def named(node: ast.Import | ast.ImportFrom, module: str) -> Iterator[str]:
    """What a statement in `module` imports: modules, not what is in them."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = module.split(".") + ["__init__"] * (MODULES[module].name == "__init__.py")
    above = package[: -node.level] if node.level else []
    base = ".".join([*above, *filter(None, [node.module])])
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if whole in MODULES else base


def imports_of(module: str) -> Iterator[Import]:
    def walk(
        node: ast.AST, kind: Literal["at import", "in a function", "for types"]
    ) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from (Import(module, of, kind, child.lineno) for of in named(child, module))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, "in a function")
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(child, "for types")
            else:
                yield from walk(child, kind)

    yield from walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), "at import")


IMPORTS = [one for module in MODULES for one in imports_of(module)]


def of(*packages: str) -> Callable[[str], bool]:
    """Whether a name is one of the packages, or in it."""
    return lambda name: any(name == p or name.startswith(f"{p}.") for p in packages)


def refuse(wrong: Callable[[Import], bool]) -> None:
    """Fail with all imports that are wrong and no exception."""
    found = [str(i) for i in IMPORTS if wrong(i) and (i.by, i.of) not in EXCEPTIONS]
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("package", ["modalities", "kernels"])
def test_what_the_core_stands_on_knows_nothing_of_it(package: str) -> None:
    known = of(*(f"kvshare_mm.{name}" for name in (package, "assets", "stream", "errors")))
    inside, ours = of(f"kvshare_mm.{package}"), of("kvshare_mm")
    refuse(lambda i: inside(i.by) and ours(i.of) and not known(i.of))


def test_server_and_desk_know_no_bench() -> None:
    served = of("kvshare_mm.apps.server", "kvshare_mm.apps.desk")
    refuse(lambda i: served(i.by) and of("kvshare_mm.apps.bench")(i.of))


def test_nothing_below_knows_apps() -> None:
    apps = of("kvshare_mm.apps")
    refuse(lambda i: apps(i.of) and not apps(i.by))


@pytest.mark.parametrize(
    ("library", "places"),
    [
        ("vllm", ["vllm"]),
        ("pymilvus", ["index"]),
        ("redis", ["store.remote_redis"]),
        ("mooncake", ["store.remote_mooncake"]),
        ("sentence_transformers", ["modalities.embed"]),
        ("open_clip", ["modalities.embed", "assets.training"]),
        ("triton", ["kernels"]),
        ("fastapi", ["apps.server", "apps.desk"]),
        ("gradio", ["apps.desk"]),
    ],
)
def test_a_library_has_one_place(library: str, places: list[str]) -> None:
    there = of(*(f"kvshare_mm.{place}" for place in places))
    refuse(lambda i: of(library)(i.of) and not there(i.by))


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["apps"] else 2])


def circle(imports: list[Import], name: Callable[[str], str]) -> list[str]:
    """Names that import each other in a circle; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for i in imports:
        if name(i.by) != name(i.of) and (i.by, i.of) not in EXCEPTIONS:
            graph.setdefault(name(i.by), set()).add(name(i.of))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_needs_itself_to_be_imported() -> None:
    assert circle([i for i in IMPORTS if i.kind == "at import"], str) == []


def test_no_circle_of_packages() -> None:
    # The face of the core names what is behind it for type checkers, and loads it when asked for.
    assert circle([i for i in IMPORTS if i.by != "kvshare_mm"], package_of) == []


def test_exceptions_are_needed() -> None:
    assert {(i.by, i.of) for i in IMPORTS} >= EXCEPTIONS
