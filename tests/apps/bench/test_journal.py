"""Runs that are killed and go on."""

from __future__ import annotations

from pathlib import Path

from kvshare_mm.apps.bench.journal import Journal, settings_key


def test_other_settings_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, ["a", 1]).put("x", 1)
    other = Journal(path, ["a", 2])
    assert other.get("x") is None
    other.put("y", 2)
    assert Journal(path, ["a", 2]).get("y") == 2
    assert Journal(path, ["a", 1]).get("x") is None


def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, "s")
    journal.put("x", 1)
    journal.put("y", {"long": "result"})
    path.write_bytes(path.read_bytes()[:-9])
    resumed = Journal(path, "s")
    assert resumed.get("x") == 1
    assert resumed.get("y") is None
    resumed.put("y", 3)
    assert Journal(path, "s").get("y") == 3


def test_a_file_that_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"\xff\xfe nonsense\n[1]\n")
    Journal(path, "s").put("x", 1)
    assert Journal(path, "s").get("x") == 1


def test_nothing_is_left_of_a_report_that_is_written(tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    Journal.beside(report, "s").put("x", 1)
    [left] = tmp_path.iterdir()
    assert left.name == "out.json.partial"
    for _ in range(2):
        Journal.forget(report)
        assert list(tmp_path.iterdir()) == []


def test_without_a_file() -> None:
    journal = Journal.beside(None, "s")
    journal.put("x", 1)
    assert journal.get("x") == 1
    Journal.forget(None)


def test_settings_key_sees_every_value() -> None:
    assert settings_key({"a": 1, "b": 2}) == settings_key({"b": 2, "a": 1})
    assert settings_key([1, "2"]) != settings_key([1, 2])
    assert settings_key([Path("x")]) != settings_key([Path("y")])
