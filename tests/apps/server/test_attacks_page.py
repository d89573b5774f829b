"""The page of attacks names tests that exist, where it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[2]
_PAGE = _TESTS.parent / "apps" / "server" / "attacks.md"
_TEST = r"(test_[a-z0-9_]+\*?)"
_NAMED = re.compile(rf"`(?:([a-z_/]*)/)?(test_[a-z0-9_]+\.py)(?:::{_TEST})?`|`{_TEST}`")


# CI also runs the tests against the installed wheel, from a copy without the page.
pytestmark = pytest.mark.skipif(not _PAGE.is_file(), reason="no source tree beside the tests")


def named() -> list[tuple[str, str]]:
    """Files and tests of the page; a test without a file is of the last one named."""
    found, file = [], ""
    page = _PAGE.read_text() if _PAGE.is_file() else ""
    for folder, name, test, alone in _NAMED.findall(page):
        if name:
            file = f"{folder or file.rpartition('/')[0]}/{name}"
        found.append((file, test or alone))
    return found


def test_the_page_names_tests() -> None:
    assert len([test for _, test in named() if test]) > 30


@pytest.mark.parametrize(("file", "test"), named())
def test_what_is_named_exists(file: str, test: str) -> None:
    text = (_TESTS / file).read_text()
    assert not test or re.search(rf"^def {test.replace('*', '[a-z0-9_]*')}\(", text, re.MULTILINE)
