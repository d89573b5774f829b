"""What is told of a request: its times, where its KV came from, the counters."""

from __future__ import annotations

from .asking import _DONOR, _PROMPTS, _TARGET, OpenLLM, outcomes, params


def test_metrics_are_sane(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=2)
    outputs = llm.generate([*_PROMPTS, _DONOR], params(5))
    llm.flush()
    outputs.append(llm.generate(_TARGET, params(5)))
    for output in outputs:
        m = output.metrics
        parts = (m.queue, m.lookup, m.plan, m.edit, m.prefill)
        assert all(part >= 0 for part in (*parts, *m.token_times))
        assert m.prefill > 0
        assert sum(parts) <= m.ttft <= m.total
        assert len(m.token_times) == len(output.token_ids) - 1
        assert m.ttft + sum(m.token_times) <= m.total + 1e-6
    assert outputs[-1].metrics.lookup > 0
    assert outputs[-1].metrics.edit > 0
    assert outputs[-1].to_dict()["metrics"]["total"] == outputs[-1].metrics.total


def test_counters_follow_provenance(open_llm: OpenLLM) -> None:
    llm = open_llm()
    outputs = []
    for prompt in (_DONOR, _TARGET, _DONOR):
        outputs.append(llm.generate(prompt, params(3)))
        llm.flush()
    counts = outcomes(llm)
    assert counts["requests"] == 3
    assert counts["generation_tokens"] == 9
    assert counts["prompt_tokens"] == sum(len(o.prompt_token_ids) for o in outputs)
    for kind in ("exact", "reused", "recomputed"):
        expected = sum(getattr(o.provenance, kind) for o in outputs)
        assert counts[f"prompt_tokens_{kind}"] == expected
    assert llm.stats()["donors"]["events"]["save_known"] == 1
