"""Tables of results by kind, for the terminal, the report and the README."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvshare_mm.apps.bench import rows
from kvshare_mm.apps.bench.rows import Report, Row
from kvshare_mm.apps.bench.theme import LABELS, label, model_label

Rows = list[list[str]]
# By heading, what a row's cell says.
Columns = dict[str, str]


class _Words(string.Formatter):
    """Templates over nested values, with units: ``{ttft_s[full]:ms}``."""

    def format_field(self, value: Any, spec: str) -> str:
        if value is None:
            return "-"
        units: dict[str, Callable[[Any], str]] = {
            "ms": lambda s: f"{1000 * s:.0f} ms" if s >= 0.01 else f"{1000 * s:.1f} ms",
            "ms1": lambda s: f"{1000 * s:.1f} ms",
            "MiB": lambda size: f"{size / 2**20:.0f} MiB",
            "yes": lambda found: "yes" if found else "no",
            "method": label,
            "model": model_label,
        }
        return units[spec](value) if spec in units else str(super().format_field(value, spec))


_say = _Words().vformat


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of result is told.

    Attributes:
        title: heading of a result, a template over the report.
        columns: templates over a row; of a report, if others have other ones.
        of: the rows of a report.
        parts: further tables of a report, by name.
    """

    title: str
    columns: Columns | Callable[[Report], Columns]
    of: Callable[[Report], list[Row]] = lambda report: [report]
    parts: dict[str, Kind] = field(default_factory=dict)

    def heading(self, report: Report) -> str:
        """What stands above the table of a report."""
        return _say(self.title, (), report)

    def rows(self, report: Report) -> Rows:
        """The table of a report, headings first."""
        columns = self.columns if isinstance(self.columns, dict) else self.columns(report)
        rows = [[_say(cell, (), row) for cell in columns.values()] for row in self.of(report)]
        return [[_say(heading, (), report) for heading in columns], *rows]


def _lookup(report: Report) -> Columns:
    depths = report["methods"]["lexical"]["recall"]
    return {
        "donors found by": "{by}",
        **{f"recall at {k}": f"{{recall[{i}]:.3f}}" for i, k in enumerate(depths)},
        "p50": "{latency_ms[p50]:.1f} ms",
        "p99": "{latency_ms[p99]:.1f} ms",
    }


def _accuracy(report: Report) -> Columns:
    ways = report["methods"]["full"]["accuracy_by_way"]
    return {
        "method": "{name:method}",
        "right": "{accuracy:.1%}",
        **{way.replace("_", " "): f"{{accuracy_by_way[{way}]:.1%}}" for way in ways},
        "as full": "{same_as_full:.1%}",
        "computed": "{computed_share:.0%}",
        "encoder runs": "{encoder_share:.0%}",
        "leaks, other picture": "{leak[leaks]} of {leak[pairs]}",
    }


def _quality(report: Report) -> Columns:
    facts = "leaks" in report["methods"]["full"]
    return {
        "method": "{name:method}",
        "{metric}": "{score[estimate]:.1f}",
        "difference to full, 95%": "{difference_to_full[estimate]:+.1f} "
        "({difference_to_full[low]:+.1f} to {difference_to_full[high]:+.1f})",
        "significant": "{significant:yes}",
        "same answer": "{same_answer:.0%}",
        "computed": "{computed_share:.0%}",
        **({"leaks": "{leaks} of {full_states_new_fact}"} if facts else {}),
    }


TABLES: dict[str, Kind] = {
    "reuse": Kind(
        "Reuse on {pairs} pairs, {model:model}",
        {
            "method": "{name:method}",
            "first token": "{ttft_s[median]:ms}",
            "times sooner": "{speedup_vs_full:.1f}",
            "computed": "{computed_share:.0%}",
            "work": "{work_share:.0%}",
            "KL mean": "{kl_first_token[mean]:.4f}",
            "KL p90": "{kl_first_token[p90]:.4f}",
            "first token same": "{first_token_agreement:.0%}",
            "greedy same": "{greedy_agreement:.0%}",
        },
        rows.methods,
    ),
    "workloads": Kind(
        "Prompts of {tokens} tokens, {number} of each kind, {model:model}: what is computed, and "
        "how many times sooner than with prefix caching",
        {
            "what changed": "{what}",
            "method": "{name:method}",
            "prefix cache": "{prefix:.0%}",
            "computed": "{computed_share:.0%}",
            "times sooner": "{speedup_vs_prefix:.1f}",
            "KL": "{kl_first_token[mean]:.4f}",
            "KL along": "{kl_along:.4f}",
            "worst": "{kl_worst:.2f}",
            "same answer": "{action_same:.0%}",
        },
        rows.workloads,
    ),
    "derived": Kind(
        "Facts that follow from an edited value, {able} of {cases} that the model can do, "
        "{model:model}",
        {
            "tokens behind the edit": "{distance}",
            "method": "{name:method}",
            "cases": "{able}",
            "margin recovery": "{margin_recovery:.2f}",
            "flip rate": "{flip_rate:.2f}",
            "of stale": "{stale_old}",
            "old answers": "{stale_answers}",
            "declined": "{declined}",
            "extra tokens": "{extra_tokens:.0f}",
        },
        rows.derived,
    ),
    "quality": Kind("Answers: {task}, {items} items, {model:model}", _quality, rows.methods),
    "frontier": Kind(
        "Divergence against work, {pairs} pairs, {model:model}",
        {
            "method": "{name:method}",
            "policy": "{policy}",
            "computed": "{computed_share:.0%}",
            "work": "{work_share:.0%}",
            "KL mean": "{kl_first_token[mean]:.4f}",
            "KL p90": "{kl_first_token[p90]:.4f}",
            "first token same": "{first_token_agreement:.0%}",
        },
        rows.points,
    ),
    "models": Kind(
        "Divergence against work of several models, {what}",
        {
            "model": "{model:model}",
            "method": "{name:method}",
            "policy": "{policy}",
            "work": "{work_share:.0%}",
            "KL mean": "{kl_first_token[mean]:.4f}",
            "KL p90": "{kl_first_token[p90]:.4f}",
            "first token same": "{first_token_agreement:.0%}",
        },
        rows.models,
    ),
    "hitrate": Kind(
        "Hit rate: {stream}, {measured} of {prompts} prompts",
        {
            "pool": "{size}",
            "prefix caching, tokens": "{methods[prefix][token_share]:.1%}",
            "KVShare, tokens": "{methods[kvshare][token_share]:.1%}",
            "prefix caching, per prompt": "{methods[prefix][prompt_share]:.1%}",
            "KVShare, per prompt": "{methods[kvshare][prompt_share]:.1%}",
            "GPTCache hits": "{gptcache_hit_rate:.1%}",
            "planner p50": "{methods[kvshare][planner_ms][p50]:.1f} ms",
            "planner p99": "{methods[kvshare][planner_ms][p99]:.1f} ms",
        },
        rows.hits,
    ),
    "reliability": Kind(
        "Pairs that nothing was fitted to, {model:model}; bound in force {bound[scale]:.3g} "
        "risk^{bound[power]:.2f}, fitted to {fitted[pairs]} pairs {fitted[scale]:.3g} "
        "risk^{fitted[power]:.2f}",
        {
            "aim": "{aim}",
            "KL mean": "{kl_first_token_mean:.4f}",
            "KL within aim": "{kl_within_target:.1%}",
            "first token same": "{first_token_agreement:.1%}",
            "computed": "{computed_share:.0%}",
            "of prefix caching": "{computed_of_prefix:.0%}",
            "reused of reusable": "{reused_of_reusable:.0%}",
        },
        lambda report: [{"aim": aim, **found} for aim, found in report["checked"].items()],
    ),
    "coverage": Kind(
        "A stream of {requests} requests that shifts, max_divergence {max_divergence}, "
        "{model:model}",
        {
            "audit share": "{way}",
            "part": "{phase}",
            "similar": "{approximate}",
            "audits": "{audits}",
            "kept": "{covered:.1%}",
            "as expected": "{as_expected:.1%}",
            "KL p95": "{kl[p95]:.4f}",
            "computed": "{computed_share:.0%}",
            "after 30 audits": "{computed_share_learned:.0%}",
            "given up": "{shut}",
            "leaks": "{leaks} of {asked_for_values}",
        },
        rows.passes,
    ),
    "audits": Kind(
        "First token of {requests} requests with pauses of {pause_s} s, {model:model}",
        {
            "audited": "{share:.0%}",
            "computed": "{computed_share:.0%}",
            "audits": "{audits}",
            "interrupted": "{interrupted}",
            "p50": "{ttft_s[p50]:ms}",
            "p90": "{ttft_s[p90]:ms}",
            "p99": "{ttft_s[p99]:ms}",
            "computed as much": "{alike[requests]}",
            "p50, times": "{alike[p50]:.3f}",
            "p99, times": "{alike[p99]:.3f}",
        },
        rows.audited,
    ),
    "demo": Kind(
        "Stories of the demo, {model:model}",
        {
            "story": "{name}",
            "prompt": "{tokens} tokens",
            LABELS["prefix"]: "{methods[prefix][ttft_s]:ms}",
            LABELS["kvshare"]: "{methods[kvshare][ttft_s]:ms}",
            "times sooner": "{sooner:.1f}",
            "computed": "{methods[kvshare][computed_tokens]}",
            "answer": "{answer}",
        },
        rows.stories,
    ),
    "template": Kind(
        "A report with other numbers, {model:model}",
        {
            "prompt": "{tokens} tokens",
            "numbers that differ": "{values} ({kept_share:.0%} kept)",
            "computed": "{computed}",
            "full recompute": "{ttft_s[full]:ms}",
            "KVShare": "{ttft_s[kvshare]:ms}",
            "times sooner": "{kvshare_times_sooner:.1f}",
            "of the ideal": "{kvshare_of_ideal:.2f}",
            "an identical prompt again": "{repeat_times_sooner:.0f} times sooner",
        },
    ),
    "lookup": Kind("{pairs} donors among {records} prompts, {model:model}", _lookup, rows.found_by),
    "overhead": Kind(
        "What a miss costs, {model:model}",
        {
            "donors": "{donors}",
            "prompt": "{tokens} tokens",
            "full prefill": "{full_prefill_s:ms}",
            "lookup and plan": "{lookup_and_plan_s:ms}",
            "save": "{save_s:ms}",
            "of the prefill": "{miss_cost_share:.1%}",
        },
    ),
    "drafts": Kind(
        "Answers of up to {max_new_tokens} tokens with drafts and without, {model:model}",
        {
            "asked with": "{what}",
            "answers": "{answers}",
            "the same": "{same}",
            "a token, plain": "{token_s[plain]:ms1}",
            "with drafts": "{token_s[drafts]:ms1}",
            "times sooner": "{times_sooner:.2f}",
            "median": "{times_sooner_median:.2f}",
            "worst": "{times_sooner_worst:.2f}",
            "tokens a forward": "{tokens_a_forward:.2f}",
        },
        lambda report: [{"what": what, **found} for what, found in report["kinds"].items()],
    ),
    "streams": Kind(
        "{streams} answers beside a prompt of {tokens} tokens, {model:model}",
        {
            "chunks of": "{what}",
            "a token usually": "{usual_s[p50]:ms1}",
            "beside it, p50": "{beside_s[p50]:ms1}",
            "p99": "{beside_s[p99]:ms1}",
            "times usual": "{times_usual:.1f}",
            "first token, short": "{short_ttft_s:ms}",
            "long": "{long_ttft_s:ms}",
            "tokens/s": "{tokens_s:.0f}",
            "of the whole's": "{throughput_of_whole:.0%}",
        },
        lambda report: [{"what": what, **found} for what, found in report["chunks"].items()],
    ),
    "burst": Kind(
        "{requests} similar requests of {tokens} tokens at once, {model:model}: "
        "{computed_share:.0%} computed, p50 {times_sooner:.1f} times sooner",
        {
            "engine": "{engine}",
            "reuse": "{what}",
            "tokens computed": "{computed}",
            "declined": "{declined}",
            "first token, p50": "{ttft_s[p50]:ms}",
            "p90": "{ttft_s[p90]:ms}",
            "all done": "{total_s:ms}",
        },
        lambda report: [
            {"engine": report["engine"], "what": what, **found}
            for what, found in report["ways"].items()
        ],
    ),
    "memory": Kind(
        "Memory of lab reports, {model:model}",
        {
            "requests stored": "{requests}",
            "in the DELTA tree": "{bytes_owned:MiB}",
            "and in 8 bits": "{bytes_packed:MiB}",
            "each stored whole": "{bytes_whole:MiB}",
            "times less": "{times_less:.1f}",
            "the process grew by": "{grown:MiB}",
            "within its budget": "{within_budget:yes}",
        },
        lambda report: [{**report, "grown": report["rss_peak_bytes"] - report["rss_before_bytes"]}],
    ),
    "vision": Kind(
        "{model}; the tower costs {tower_to_text:.2f} times what the text part does for an image "
        "token (3B: {tower_to_text_of_3b:.2f})",
        {
            "picture": "{layout}",
            "method": "{name:method}",
            "read": "{read_s:ms}",
            "tower": "{tower_s:ms}",
            "text": "{text_s:ms}",
            "first token": "{ttft_s:ms}",
            "times sooner": "{times_sooner:.1f}",
            "computed": "{computed_tokens} of {tokens}",
            "tower runs": "{tower_runs}",
        },
        rows.layouts,
    ),
    "pictures": Kind(
        "{pairs} similar requests about pictures, {model:model}",
        _accuracy,
        rows.pictures,
        parts={
            "traffic": Kind(
                "Pictures that are known, {model:model}",
                {
                    "what changed": "{what}",
                    "prefix cache": "{computed_share[prefix]:.0%}",
                    "computed": "{computed_share[kvshare]:.0%}",
                    "times sooner": "{speedup_vs_prefix:.1f}",
                    "same answer": "{same_as_full:.0%}",
                },
                rows.known_pictures,
            )
        },
    ),
    "serve": Kind(
        "What was reused under load, {model:model}",
        {
            "clients": "{concurrency}",
            "answered": "{completed} of {requests}",
            "prompt tokens": "{prompt_tokens}",
            "exact": "{shares[exact]:.0%}",
            "reused": "{shares[reused]:.0%}",
            "computed": "{shares[recomputed]:.0%}",
            "declined": "{why}",
            "first token, p50": "{ttft_s[p50]:ms}",
            "of it in the engine": "{engine_ttft_s[p50]:ms}",
        },
        rows.declined,
    ),
    "server-overhead": Kind(
        "The server beside the Python API, {model:model}",
        {
            "asked": "{name}",
            "prompt": "{tokens} tokens",
            "first token": "{ttft:ms1}",
            "outside the engine": "{outside:ms1}",
            "more than the API": "{more:ms1}",
            "of the pairs, p90": "{p90:ms1}",
            "same answer": "{same}",
        },
        rows.sides,
    ),
    "kernels": Kind(
        "Attention and KV edit of one layer, {dtype}",
        {
            "method": "{method}",
            "tokens": "{num_tokens:,}",
            "computed": "{num_computed:,}",
            "runs of": "{run}",
            "ms": "{ms:.3f}",
            "times sooner": "{speedup:.1f}",
            "max error": "{max_abs_error:.1e}",
        },
        lambda report: report["attention"] + report["edit"],
    ),
    "vllm": Kind(
        "Inside vLLM {vllm}, prefix caching on, {model:model}",
        {
            "prompt": "{name} ({tokens} tokens)",
            "stock vLLM": "{ttft_s[stock]:ms}",
            "KVShare": "{ttft_s[kvshare]:ms}",
            "times sooner": "{times_sooner:.1f}",
            "of the ideal": "{of_ideal:.2f}",
            "exact / reused / computed": "{exact} / {reused} / {computed}",
            "same answer": "{answer_same:yes}",
            "a miss": "{miss_overhead:+.1%}",
        },
        lambda report: report["cases"],
    ),
}
