"""What an audit found, by way and by family: JSON-ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvshare_mm.apps.audit.compare import compared, small_words
from kvshare_mm.apps.audit.log import Asked, families
from kvshare_mm.apps.audit.replay import AGAIN, FULL, PREFIX, Result
from kvshare_mm.apps.bench.divergence import spread
from kvshare_mm.errors import ConfigError

_SHOWN = 300  # characters of a question


def summary(log: Sequence[Asked], results: Sequence[Result], model: str) -> dict[str, Any]:
    """The whole report.

    Raises:
        ConfigError: every request was refused.
    """
    known = small_words(
        [text for asked in log for text in asked.texts]
        + [r["text"] for result in results if "refused" not in result for r in result.values()]
    )
    served: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for asked, family, result in zip(log, families(log), results, strict=True):
        if "refused" in result:
            refused.append({"line": asked.line, "why": result["refused"]})
            continue
        ways = {
            name: {**reply, **compared(result[FULL], reply, known)}
            for name, reply in result.items()
        }
        question = short(asked.texts[-1], _SHOWN)
        served.append({"line": asked.line, "family": family, "question": question, "ways": ways})
    if not served:
        first = refused[0]
        raise ConfigError(f"no request was answered; line {first['line']}: {first['why']}")
    reuses = [name for name in served[0]["ways"] if name not in (PREFIX, FULL, AGAIN)]
    members: dict[int, list[dict[str, Any]]] = {}
    for request in served:
        members.setdefault(request["family"], []).append(request)
    rows = [
        {"line": line, "question": its[0]["question"], **_figures(reuses[-1], its)}
        for line, its in members.items()
    ]
    return {
        "kind": "audit",
        "model": model,
        "sampled": sum(asked.sampled for asked in log),
        "ways": {name: _figures(name, served) for name in (*reuses, PREFIX, FULL)},
        "families_of": reuses[-1],
        "families": sorted(rows, key=lambda row: (row["same"] - row["answers"], -row["answers"])),
        "refused": refused,
        "requests": served,
    }


def _figures(name: str, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What became of some requests served one way."""
    all_ways = [request["ways"] for request in requests]
    mine, prefix = ([ways[n] for ways in all_ways] for n in (name, PREFIX))
    changed = [ways for ways in all_ways if ways[name]["outcome"] == "changed"]
    ttft = spread([reply["ttft"] for reply in mine], 50, 90)
    theirs = spread([reply["ttft"] for reply in prefix])["mean"]
    outcomes = [reply["outcome"] for reply in mine]
    return {
        "answers": len(mine),
        **{outcome: outcomes.count(outcome) for outcome in ("same", "cut", "changed")},
        "numbers": sum(ways[name]["numbers"] is not None for ways in changed),
        "names": sum(ways[name]["names"] is not None for ways in changed),
        "facts": sum(bool(w[name]["numbers"] or w[name]["names"]) for w in changed),
        "by_rounding": sum(ways[AGAIN]["text"] != ways[FULL]["text"] for ways in changed),
        "less_than_prefix": sum(
            a["computed"] < b["computed"] for a, b in zip(mine, prefix, strict=True)
        ),
        "prompt_tokens": sum(reply["prompt"] for reply in mine),
        "computed": sum(reply["computed"] for reply in mine),
        "ttft_s": ttft,
        "times_sooner_than_prefix": theirs / ttft["mean"] if theirs and ttft["mean"] else None,
    }


def short(text: str, length: int) -> str:
    """The beginning and the end of a text: what is asked often stands last."""
    line = " ".join(text.split())
    half = (length - 3) // 2
    return line if len(line) <= length else f"{line[:half]} … {line[-half:]}"
