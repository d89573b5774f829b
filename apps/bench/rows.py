"""The rows of each kind of report's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Report = dict[str, Any]
Row = Mapping[str, Any]


def methods(report: Report) -> list[Row]:
    return [{**report, "name": name, **found} for name, found in report["methods"].items()]


def workloads(report: Report) -> list[Row]:
    """A row for each kind; prefix caching's figures beside the others'."""
    rows: list[Row] = []
    for kind, found in report["kinds"].items():
        prefix = found["methods"]["prefix"]["computed_share"]
        for name, method in found["methods"].items():
            if name not in ("full", "prefix"):
                rows.append({"what": kind, "prefix": prefix, "name": name, **method})
    return rows


def derived(report: Report) -> list[Row]:
    return [
        {
            "distance": distance if int(distance) else "adjacent",
            "able": sum(found["able"].values()),
            "stale_old": found["stale_old"],
            "name": name,
            **method,
        }
        for distance, found in report["distances"].items()
        for name, method in found["methods"].items()
    ]


def passes(report: Report) -> list[Row]:
    """A row for each part of the stream, of each time that it was served."""
    return [
        {"way": "fixed" if name == "fixed" else f"{float(name):.0%}", "phase": phase, **found}
        for name, phases in report["passes"].items()
        for phase, found in phases.items()
    ]


def audited(report: Report) -> list[Row]:
    return [{"share": float(share), **found} for share, found in report["shares"].items()]


def points(report: Report) -> list[Row]:
    return [
        {"name": name, **point} for name, points in report["methods"].items() for point in points
    ]


def models(report: Report) -> list[Row]:
    """By default, and by what has windows of 16 instead."""
    return [
        {"model": each["model"], **point}
        for each in report["reports"]
        for point in points(each)
        if (point["name"], point["policy"]) in {("kvshare", "default"), ("epic", "window:16")}
    ]


def stories(report: Report) -> list[Row]:
    stories = report["stories"] + report.get("pictures", {}).get("stories", [])
    return [
        {
            **story,
            "sooner": story["methods"]["prefix"]["ttft_s"] / story["methods"]["kvshare"]["ttft_s"],
        }
        for story in stories
    ]


def layouts(report: Report) -> list[Row]:
    return [
        {"layout": layout, "tokens": found["tokens"], "name": name, **method}
        for layout, found in report["layouts"].items()
        for name, method in found["methods"].items()
    ]


def pictures(report: Report) -> list[Row]:
    return [{**row, "leak": report["leaks"][row["name"]]} for row in methods(report)]


def known_pictures(report: Report) -> list[Row]:
    names = {
        "other_question": "same picture, another question",
        "other_name": "a picture behind an edited name",
    }
    return [
        {"what": names[way], **found} for way, found in report.get("traffic", {}).items() if found
    ]


def sides(report: Report) -> list[Row]:
    more = report["difference_s"]
    same = f"{report['same_answers']} of {report['repeats']}"
    paired: dict[str, Row] = {"api": {"more": None, "p90": None, "same": None}}
    paired["server"] = {"more": more["median"], "p90": more["p90"], "same": same}
    return [
        {
            "name": name,
            "tokens": report["tokens"],
            "ttft": report["ttft_s"][side],
            "outside": report["outside_engine_s"][side],
            **paired[side],
        }
        for side, name in (("api", "Python API"), ("server", "server"))
    ]


def hits(report: Report) -> list[Row]:
    return [{"size": size, **found} for size, found in report["pool_sizes"].items()]


def found_by(report: Report) -> list[Row]:
    names = {
        "lexical": "3-grams, inverted list",
        "milvus_dense": "embedding, Milvus",
        "hybrid": "both, Milvus",
    }
    return [
        {**(found := report["methods"][name]), "by": by, "recall": list(found["recall"].values())}
        for name, by in names.items()
    ]


def declined(report: Report) -> list[Row]:
    why = ", ".join(f"{reason} ({n})" for reason, n in report["declined"].items())
    return [{**report, "why": why or None}]
