"""`kvshare bench reuse|template|workloads --engine vllm`: vLLM as it comes beside it with KVShare.

Both are real engines with processes of their own, started alike and with prefix caching on. They
take turns, so that a noisy machine is noisy for both; half of the repeats are made after starting
them in the other order; and each measurement has a cache salt of its own: what an engine knows when
the target comes is the donor, and nothing of earlier rounds.

The ideal is stock vLLM's first token when just as many tokens as KVShare computed stand behind a
beginning that its prefix cache has: no lookup, no plan, no load, and one forward.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from kvshare_mm.answers import answers
from kvshare_mm.apps.bench.prompts import prompt
from kvshare_mm.config import KVShareConfig, RequestOptions
from kvshare_mm.models.loader import load_tokenizer
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.request import RequestSpec
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.sampling import SamplingParams
from kvshare_mm.stream import SegmentStream, text_stream
from kvshare_mm.vllm.arguments import check_installed, engine_arguments
from kvshare_mm.vllm.compat import version
from kvshare_mm.vllm.offline import VLLMEngine

# Donors are stored behind the answer; the next request shall neither miss one nor pay for it.
_SETTLE_S = 0.5
_KV_BYTES = 1 << 30
_WAYS = ("stock", "kvshare")

# With the donor known, and with an unrelated one known.
_Rounds = tuple[list[dict[str, RequestOutput]], list[dict[str, RequestOutput]]]


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt to measure and the similar one that came before it."""

    name: str
    donor: SegmentStream
    target: SegmentStream


def cases_of(model: str, pairs: Sequence[dict[str, Any]]) -> list[Case]:
    """Pairs of texts or chats, as the model is asked them.

    Raises:
        InvalidRequestError: a text is empty, or messages hold media.
    """
    tokenizer = load_tokenizer(model)
    return [
        Case(str(p["id"]), prompt(p["donor"], tokenizer), prompt(p["target"], tokenizer))
        for p in pairs
    ]


def run(
    model: str,
    cases: Sequence[Case],
    *,
    repeats: int,
    max_new_tokens: int,
    repair: str | None = None,
) -> dict[str, Any]:
    """Measure every case, with its donor known and (the miss) with an unrelated one known.

    Returns:
        Medians in seconds and tokens by origin for each case, JSON-ready. ``of_ideal`` is how many
        times the ideal KVShare's first token takes.

    Raises:
        ConfigError: vLLM is not installed.
        ModelLoadError: vLLM cannot serve the model.
        InvalidRequestError: a prompt is longer than the model's context.
    """
    check_installed()
    longest = max(len(s) for case in cases for s in (case.donor, case.target)) + max_new_tokens
    rounds: list[_Rounds] = [([], []) for _ in cases]
    # Of two engines alike the one that was started later is some percent faster here.
    for order, part in ((_WAYS, repeats - repeats // 2), (_WAYS[::-1], repeats // 2)):
        if not part:
            continue
        with _engines(model, longest + 1, repair, order) as engines:
            _round(engines, cases[0], "warm", max_new_tokens)
            _round(engines, cases[0], "warm again", max_new_tokens)
            for case, (hits, misses) in zip(cases, rounds, strict=True):
                more = _measure(engines, case, part, max_new_tokens)
                hits.extend(more[0])
                misses.extend(more[1])
    rows = [_row(case, *each) for case, each in zip(cases, rounds, strict=True)]
    sooner = [row["times_sooner"] for row in rows]
    return {
        "kind": "vllm",
        "model": model,
        "vllm": version(),
        "eager": True,
        "repeats": repeats,
        "max_new_tokens": max_new_tokens,
        "times_sooner": {"median": statistics.median(sooner), "least": min(sooner)},
        "of_ideal": statistics.median(row["of_ideal"] for row in rows),
        "miss_overhead": statistics.median(row["miss_overhead"] for row in rows),
        "answers_same": statistics.mean(row["answer_same"] for row in rows),
        "cases": rows,
    }


@contextmanager
def _engines(
    model: str, max_model_len: int, repair: str | None, order: Sequence[str]
) -> Iterator[dict[str, VLLMEngine]]:
    options: dict[str, Any] = {"audit_share": 0, **({"repair": repair} if repair else {})}
    own = {"enforce_eager": True, "disable_log_stats": True, "kv_cache_memory_bytes": _KV_BYTES}
    config = KVShareConfig.of(
        model=model, engine="vllm", max_model_len=max_model_len, engine_options=own, **options
    )
    arguments = engine_arguments(config)
    plain = {name: value for name, value in arguments.items() if name != "kv_transfer_config"}
    with ExitStack() as stack:
        engines = {}
        for way in order:
            engines[way] = VLLMEngine(plain if way == "stock" else arguments)
            stack.callback(engines[way].close)
        yield engines


def _measure(
    engines: dict[str, VLLMEngine], case: Case, repeats: int, max_new_tokens: int
) -> _Rounds:
    stranger = Case(case.name, _shuffled(case.donor), case.target)
    hits, misses = [], []
    for i in range(repeats):
        salt = f"{case.name} {i}"
        found = _round(engines, case, salt, max_new_tokens, turn=i)
        found["ideal"] = _ideal(engines["stock"], case.target, found["kvshare"], salt)
        hits.append(found)
        misses.append(_round(engines, stranger, f"{case.name} {i} miss", max_new_tokens, turn=i))
    return hits, misses


def _row(
    case: Case, hits: list[dict[str, RequestOutput]], misses: list[dict[str, RequestOutput]]
) -> dict[str, Any]:
    last = hits[-1]
    hit, miss = _medians(hits, *_WAYS, "ideal"), _medians(misses, *_WAYS)
    use = last["kvshare"].provenance
    return {
        "name": case.name,
        "tokens": len(case.target),
        "ttft_s": hit,
        "times_sooner": hit["stock"] / hit["kvshare"],
        "of_ideal": statistics.median(_ratio(found, "kvshare", "ideal") for found in hits),
        "stock_cached": last["stock"].provenance.exact,
        "exact": use.exact,
        "reused": use.reused,
        "computed": use.recomputed,
        "declined": use.declined,
        "answer_same": last["stock"].token_ids == last["kvshare"].token_ids,
        "miss_ttft_s": miss,
        "miss_reused": misses[-1]["kvshare"].provenance.reused,
        # Of neighbours in time: what slows a round down slows both.
        "miss_overhead": statistics.median(_ratio(r, "kvshare", "stock") - 1 for r in misses),
    }


def _round(
    engines: dict[str, VLLMEngine], case: Case, salt: str, max_new_tokens: int, turn: int = 0
) -> dict[str, RequestOutput]:
    """The donor to both engines, then the target to both; who is first takes turns."""
    order = _WAYS if turn % 2 == 0 else _WAYS[::-1]
    for way in order:
        _serve(engines[way], case.donor, salt, 1)
    time.sleep(_SETTLE_S)
    found = {}
    for way in order:
        found[way] = _serve(engines[way], case.target, salt, max_new_tokens)
        time.sleep(_SETTLE_S)
    return found


def _ideal(
    stock: VLLMEngine, target: SegmentStream, use: RequestOutput, salt: str
) -> RequestOutput:
    """As many fresh tokens as `use` computed, behind as much of `target`, which was just served."""
    computed = use.provenance.recomputed
    known = (len(target) - computed) // stock.block_size * stock.block_size
    ids = target.token_ids.tolist()
    fresh = _shuffled(target).token_ids.tolist()[:computed]
    return _serve(stock, text_stream([*ids[:known], *fresh]), salt, 1)


def _serve(
    engine: VLLMEngine, stream: SegmentStream, salt: str, max_new_tokens: int
) -> RequestOutput:
    params = SamplingParams(max_tokens=max_new_tokens)
    spec = RequestSpec(
        stream, "", params, namespace("bench", salt), RequestOptions(cache_salt=salt)
    )
    return answers(engine, [spec])[0]


def _medians(rounds: Sequence[dict[str, RequestOutput]], *ways: str) -> dict[str, float]:
    return {way: statistics.median(r[way].metrics.ttft for r in rounds) for way in ways}


def _ratio(found: dict[str, RequestOutput], way: str, other: str) -> float:
    return found[way].metrics.ttft / found[other].metrics.ttft


def _shuffled(stream: SegmentStream) -> SegmentStream:
    """The same tokens in an order that has nothing to do with the prompt's."""
    ids = stream.token_ids.tolist()
    random.Random(0).shuffle(ids)
    return text_stream(ids)
