"""Tables of what reuse does to answers: reuse, quality, frontier, reliability; and of hit rates."""

from __future__ import annotations

from kvshare_mm.apps.bench.figures.theme import label, model_label
from kvshare_mm.apps.bench.tables.base import Kind, Report, Rows


def _reuse(report: Report) -> Rows:
    rows = [["method", "first token", "times sooner", "computed", "work", "KL mean", "KL p90",
             "first token same", "greedy same"]]  # fmt: skip
    for name, m in report["methods"].items():
        rows.append(
            [
                label(name),
                f"{1000 * m['ttft_s']['median']:.0f} ms",
                f"{m['speedup_vs_full']:.1f}",
                f"{m['computed_share']:.0%}",
                f"{m['work_share']:.0%}",
                f"{m['kl_first_token']['mean']:.4f}",
                f"{m['kl_first_token']['p90']:.4f}",
                f"{m['first_token_agreement']:.0%}",
                f"{m['greedy_agreement']:.0%}",
            ]
        )
    return rows


def _quality(report: Report) -> Rows:
    facts = "leaks" in report["methods"]["full"]
    rows = [["method", report["metric"], "difference to full, 95%", "significant", "same answer",
             "computed", *(["leaks"] if facts else [])]]  # fmt: skip
    for name, m in report["methods"].items():
        change = m["difference_to_full"]
        rows.append(
            [
                label(name),
                f"{m['score']['estimate']:.1f}",
                f"{change['estimate']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f})",
                "yes" if m["significant"] else "no",
                f"{m['same_answer']:.0%}",
                f"{m['computed_share']:.0%}",
                *([f"{m['leaks']} of {m['full_states_new_fact']}"] if facts else []),
            ]
        )
    return rows


def _frontier(report: Report) -> Rows:
    rows = [["method", "policy", "computed", "work", "KL mean", "KL p90", "first token same"]]
    for name, points in report["methods"].items():
        for p in points:
            rows.append(
                [
                    label(name),
                    p["policy"],
                    f"{p['computed_share']:.0%}",
                    f"{p['work_share']:.0%}",
                    f"{p['kl_first_token']['mean']:.4f}",
                    f"{p['kl_first_token']['p90']:.4f}",
                    f"{p['first_token_agreement']:.0%}",
                ]
            )
    return rows


def _hitrate(report: Report) -> Rows:
    rows = [["pool", "prefix caching, tokens", "KVShare, tokens", "prefix caching, per prompt",
             "KVShare, per prompt", "GPTCache hits", "planner p50", "planner p99"]]  # fmt: skip
    for size, found in report["pool_sizes"].items():
        prefix, ours = found["methods"]["prefix"], found["methods"]["kvshare"]
        hits = found["gptcache_hit_rate"]
        rows.append(
            [
                size,
                f"{prefix['token_share']:.1%}",
                f"{ours['token_share']:.1%}",
                f"{prefix['prompt_share']:.1%}",
                f"{ours['prompt_share']:.1%}",
                "-" if hits is None else f"{hits:.1%}",
                f"{ours['planner_ms']['p50']:.1f} ms",
                f"{ours['planner_ms']['p99']:.1f} ms",
            ]
        )
    return rows


def _reliability(report: Report) -> Rows:
    rows = [["aim", "KL mean", "KL within aim", "first token same", "computed",
             "of prefix caching", "reused of reusable"]]  # fmt: skip
    for name, m in report["checked"].items():
        rows.append(
            [
                name,
                f"{m['kl_first_token_mean']:.4f}",
                f"{m['kl_within_target']:.1%}",
                f"{m['first_token_agreement']:.1%}",
                f"{m['computed_share']:.0%}",
                f"{m['computed_of_prefix']:.0%}",
                f"{m['reused_of_reusable']:.0%}",
            ]
        )
    return rows


def _reliability_title(report: Report) -> str:
    bound, fit = report["bound"], report["fitted"]
    return (
        f"Pairs that nothing was fitted to, {model_label(report['model'])}; bound in force "
        f"{bound['scale']:.3g} risk^{bound['power']:.2f}, fitted to {fit['pairs']} pairs "
        f"{fit['scale']:.3g} risk^{fit['power']:.2f}"
    )


FIDELITY: dict[str, Kind] = {
    "reuse": Kind(lambda r: f"Reuse on {r['pairs']} pairs, {model_label(r['model'])}", _reuse),
    "quality": Kind(
        lambda r: f"Answers: {r['task']}, {r['items']} items, {model_label(r['model'])}", _quality
    ),
    "frontier": Kind(
        lambda r: f"Divergence against work, {r['pairs']} pairs, {model_label(r['model'])}",
        _frontier,
    ),
    "hitrate": Kind(
        lambda r: f"Hit rate: {r['stream']}, {r['measured']} of {r['prompts']} prompts", _hitrate
    ),
    "reliability": Kind(_reliability_title, _reliability),
}
