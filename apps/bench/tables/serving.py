"""Tables of what clients of a server feel, and of what the server costs them."""

from __future__ import annotations

from kvshare_mm.apps.bench.figures.theme import model_label
from kvshare_mm.apps.bench.tables.base import Kind, Report, Rows

_SHOWN = ("p50", "p90", "p99")


def _serve(report: Report) -> Rows:
    rate, clients = report["rate"], report["concurrency"]
    load = f"{rate:g} requests a second" if rate else f"{clients} client{'s'[: clients != 1]}"
    return [
        ["load", "answered", f"first token, {' / '.join(_SHOWN)}", "between tokens", "whole answer",
         "requests a second", "tokens a second", "of the prompts cached"],
        [load, f"{report['completed']} of {report['requests']}",
         *(_spread(report[name]) for name in ("ttft_s", "inter_token_s", "e2e_s")),
         f"{report['requests_per_s']:.2f}", f"{report['completion_tokens_per_s']:.1f}",
         f"{report['cached_share']:.0%}"],
    ]  # fmt: skip


def _overhead(report: Report) -> Rows:
    more = report["difference_s"]
    rows = [["asked", "prompt", "first token", "outside the engine", "more than the API",
             "of the pairs, p90", "same answer"]]  # fmt: skip
    for side, name in (("api", "Python API"), ("server", "server")):
        paired = [_ms(more["median"]), _ms(more["p90"])] if side == "server" else ["", ""]
        same = f"{report['same_answers']} of {report['repeats']}" if side == "server" else ""
        rows.append(
            [name, f"{report['tokens']} tokens", _ms(report["ttft_s"][side]),
             _ms(report["outside_engine_s"][side]), *paired, same]
        )  # fmt: skip
    return rows


def _spread(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    return f"{' / '.join(f'{1000 * spread[part]:.0f}' for part in _SHOWN)} ms"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


SERVING: dict[str, Kind] = {
    "serve": Kind(lambda r: f"What clients feel, {model_label(r['model'])}", _serve),
    "server-overhead": Kind(
        lambda r: f"The server beside the Python API, {model_label(r['model'])}", _overhead
    ),
}
