"""Table of vLLM beside vLLM with KVShare in it."""

from __future__ import annotations

from kvshare_mm.apps.bench.figures.theme import model_label
from kvshare_mm.apps.bench.tables.base import Kind, Report, Rows, ms


def _vllm(report: Report) -> Rows:
    rows = [["prompt", "stock vLLM", "KVShare", "times sooner", "exact / reused / computed",
             "same answer", "a miss"]]  # fmt: skip
    for case in report["cases"]:
        rows.append(
            [
                f"{case['name']} ({case['tokens']} tokens)",
                ms(case["ttft_s"]["stock"]),
                ms(case["ttft_s"]["kvshare"]),
                f"{case['times_sooner']:.1f}",
                f"{case['exact']} / {case['reused']} / {case['computed']}",
                "yes" if case["answer_same"] else "no",
                f"{case['miss_overhead']:+.1%}",
            ]
        )
    return rows


VLLM: dict[str, Kind] = {
    "vllm": Kind(
        lambda r: f"Inside vLLM {r['vllm']}, prefix caching on, {model_label(r['model'])}", _vllm
    )
}
