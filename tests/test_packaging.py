"""The package list in pyproject.toml is kept by hand; these tests notice what it misses."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import kvshare_mm

ROOT = Path(__file__).resolve().parents[1]
TRAINING = "kvshare_mm.assets.training"
SOURCE_FOLDERS = ("apps", "assets", "kernels", "kvshare_mm", "modalities")

# CI also runs the tests against the installed wheel, from a copy without the sources.
needs_sources = pytest.mark.skipif(
    not (ROOT / "kvshare_mm").is_dir(), reason="no source tree beside the tests"
)


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def package_of(folder: PurePosixPath) -> str:
    """Name under which a source folder is imported: ``apps/bench`` is ``kvshare_mm.apps.bench``."""
    name = ".".join(folder.parts)
    return name if folder.parts[0] == "kvshare_mm" else f"kvshare_mm.{name}"


def source_files() -> list[PurePosixPath]:
    return [
        PurePosixPath(path.relative_to(ROOT).as_posix())
        for folder in SOURCE_FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


@needs_sources
def test_every_folder_with_code_is_a_listed_package() -> None:
    on_disk = {package_of(path.parent) for path in source_files() if path.suffix == ".py"}
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == on_disk - {TRAINING}


@needs_sources
def test_nothing_that_is_shipped_needs_training() -> None:
    shipped = [path for path in source_files() if path.suffix == ".py"]
    users = [p for p in shipped if TRAINING in (ROOT / p).read_text(encoding="utf-8")]
    assert [str(p) for p in users if "training" not in p.parts] == []


@needs_sources
def test_every_package_has_an_init_file() -> None:
    folders = {path.parent for path in source_files() if path.suffix == ".py"}
    assert [
        folder for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()
    ] == []


@needs_sources
def test_every_file_that_is_not_code_is_package_data() -> None:
    package_data = pyproject()["tool"]["setuptools"]["package-data"]

    def is_shipped(path: PurePosixPath) -> bool:
        # package-data patterns are relative to the folder of the package they are listed for
        return any(
            path.relative_to(folder).match(pattern)
            for folder in path.parents[:-1]
            for pattern in package_data.get(package_of(folder), [])
        )

    others = [path for path in source_files() if path.suffix not in {".py", ".md"}]
    assert [str(path) for path in others if not is_shipped(path)] == []


def imported_modules(path: Path) -> set[str]:
    """Top-level names of what a source file imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module.partition(".")[0])
    return modules


@needs_sources
def test_every_import_is_a_declared_dependency() -> None:
    project = pyproject()["project"]
    requirements = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {normalized(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}
    providers = packages_distributions()

    def absent(module: str) -> list[str]:
        """Packages that may bring a module which this platform or Python has not."""
        return [module, *(name for name in declared if name.startswith(f"{module}-"))]

    ours = {*sys.stdlib_module_names, "kvshare_mm"}
    undeclared = [
        f"{path}: {module}"
        for path in source_files()
        if path.suffix == ".py"
        for module in sorted(imported_modules(ROOT / path) - ours)
        if declared.isdisjoint(map(normalized, providers.get(module, absent(module))))
    ]
    assert undeclared == []


def test_only_kvshare_mm_is_installed() -> None:
    """No top-level `kernels`: that is a Hugging Face package that transformers imports."""
    # Builds leave an egg-info in the source tree, which is no installation: it has no RECORD.
    installed = [dist for dist in distributions(name="kvshare-mm") if dist.read_text("RECORD")]
    assert installed
    for dist in installed:
        assert (dist.read_text("top_level.txt") or "").split() == ["kvshare_mm"]
        modules = {path.parts[0] for path in dist.files or [] if path.suffix == ".py"}
        assert {name for name in modules if not name.startswith("__editable__")} <= {"kvshare_mm"}


def test_training_is_not_installed() -> None:
    """It is a tool for developers, who have the source tree."""
    installed = [dist.files or [] for dist in distributions(name="kvshare-mm")]
    assert [str(f) for f in chain(*installed) if f.match("kvshare_mm/assets/training/*")] == []


def test_help_waits_for_no_torch() -> None:
    code = (
        "import sys, kvshare_mm.apps.cli;"
        "print(*{'torch', 'transformers', 'pymilvus'} & set(sys.modules))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    assert all(getattr(kvshare_mm, name) is not None for name in kvshare_mm.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        kvshare_mm.nonsense  # noqa: B018
