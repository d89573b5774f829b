"""Tables of cost and speed: the demo, templates, lookup, a miss, memory."""

from __future__ import annotations

from kvshare_mm.apps.bench.figures.theme import LABELS, model_label
from kvshare_mm.apps.bench.tables.base import Kind, Report, Rows, mib, ms

_DEMO = [LABELS[name] for name in ("full", "prefix", "kvshare")]
_LOOKUPS = {
    "lexical": "3-grams, inverted list",
    "milvus_sparse": "3-grams, Milvus",
    "milvus_dense": "embedding, Milvus",
    "hybrid": "both, Milvus",
}


def _demo(report: Report) -> Rows:
    rows = [["story", "prompt", *_DEMO, "computed", "same answer"]]
    for story in report["stories"] + report.get("pictures", {}).get("stories", []):
        found = story["methods"]
        sooner = found["full"]["ttft_s"] / found["kvshare"]["ttft_s"]
        rows.append(
            [
                story["name"],
                f"{story['tokens']} tokens",
                ms(found["full"]["ttft_s"]),
                ms(found["prefix"]["ttft_s"]),
                f"{ms(found['kvshare']['ttft_s'])} ({sooner:.1f} times sooner)",
                str(found["kvshare"]["computed_tokens"]),
                "yes" if story["same_answer"] else "no",
            ]
        )
    return rows


def _template(report: Report) -> Rows:
    times = report["ttft_s"]
    return [
        ["prompt", "numbers that differ", "computed", "full recompute", "KVShare", "times sooner",
         "of the ideal", "an identical prompt again"],
        [f"{report['tokens']} tokens", f"{report['values']} ({report['kept_share']:.0%} kept)",
         str(report["computed"]), ms(times["full"]), ms(times["kvshare"]),
         f"{report['kvshare_times_sooner']:.1f}", f"{report['kvshare_of_ideal']:.2f}",
         f"{report['repeat_times_sooner']:.0f} times sooner"],
    ]  # fmt: skip


def _lookup(report: Report) -> Rows:
    depths = list(report["methods"]["lexical"]["recall"])
    rows = [["donors found by", *(f"recall at {k}" for k in depths), "p50", "p99"]]
    for name, found in report["methods"].items():
        recall, latency = found["recall"], found["latency_ms"]
        rows.append(
            [_LOOKUPS[name], *(f"{recall[k]:.3f}" for k in depths)]
            + [f"{latency[part]:.1f} ms" for part in ("p50", "p99")]
        )
    return rows


def _overhead(report: Report) -> Rows:
    return [
        ["donors", "prompt", "full prefill", "lookup and plan", "capture", "of the prefill"],
        [str(report["donors"]), f"{report['tokens']} tokens", ms(report["full_prefill_s"]),
         ms(report["lookup_and_plan_s"]), ms(report["capture_s"]),
         f"{report['miss_cost_share']:.1%}"],
    ]  # fmt: skip


def _memory(report: Report) -> Rows:
    grown = report["rss_peak_bytes"] - report["rss_before_bytes"]
    return [
        ["requests stored", "in the DELTA tree", "each stored whole", "times less",
         "the process grew by", "within its budget"],
        [str(report["requests"]), mib(report["bytes_owned"]), mib(report["bytes_whole"]),
         f"{report['times_less']:.1f}", mib(grown), "yes" if report["within_budget"] else "no"],
    ]  # fmt: skip


COST: dict[str, Kind] = {
    "demo": Kind(lambda r: f"Stories of the demo, {model_label(r['model'])}", _demo),
    "template": Kind(
        lambda r: f"A report with other numbers, {model_label(r['model'])}", _template
    ),
    "lookup": Kind(
        lambda r: f"{r['pairs']} donors among {r['records']} prompts, {model_label(r['model'])}",
        _lookup,
    ),
    "overhead": Kind(lambda r: f"What a miss costs, {model_label(r['model'])}", _overhead),
    "memory": Kind(lambda r: f"Memory of lab reports, {model_label(r['model'])}", _memory),
}
