"""`kvshare bench reuse`: methods side by side on pairs of similar prompts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.rig import Rig, Served, kl_divergence, machine, spread
from kvshare_mm.chat import chat_stream, prompt_stream
from kvshare_mm.errors import ConfigError, InvalidRequestError
from kvshare_mm.stream import SegmentStream

Text = str | list[dict[str, Any]]


def read_pairs(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Pairs of a JSON Lines file: ``{"id", "donor", "target", "reference"?}``.

    Raises:
        ConfigError: no such file, or a line that is not a pair; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the pairs in {path}: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            donor, target = pair["donor"], pair["target"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number} is not a pair with donor and target: {error!r}"
            ) from error
        if not donor or not target:
            raise ConfigError(f"{path}:{number} has an empty donor or target")
        pairs.append({"id": str(number), **pair})
    if not pairs:
        raise ConfigError(f"{path} has no pairs")
    return pairs[:limit]


def run(
    rig: Rig,
    pairs: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    *,
    max_new_tokens: int = 64,
    repeats: int = 3,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure every method on every pair.

    For each pair the donor is prefilled and stored; then the target is served by all methods in
    turn, `repeats` times over, so that a noisy machine is noisy for all of them. "full" is always
    measured: the others are compared with it.

    Returns:
        The report as JSON-ready data; see the README for its fields.
    """
    if METHODS["full"] not in methods:
        methods = [METHODS["full"], *methods]
    per_pair = []
    skipped = []
    for pair in track(pairs, "Measuring pairs", disable=not progress, transient=True):
        try:
            per_pair.append(_measure(rig, pair, methods, max_new_tokens, repeats))
        except InvalidRequestError as error:
            skipped.append({"id": pair["id"], "reason": str(error)})
    if not per_pair:
        raise ConfigError(f"no pair could be served; the first: {skipped[0]['reason']}")
    return {
        "machine": machine(),
        "model": rig.loaded.name,
        "dtype": str(rig.loaded.dtype).removeprefix("torch."),
        "pairs": len(per_pair),
        "skipped": skipped,
        "repeats": repeats,
        "max_new_tokens": max_new_tokens,
        "methods": {m.name: _summary(m.name, per_pair) for m in methods},
        "per_pair": per_pair,
    }


def encode(rig: Rig, text: Text) -> SegmentStream:
    """A prompt as the model is asked it: text becomes a user message if there is a template."""
    tokenizer = rig.loaded.tokenizer
    if isinstance(text, str):
        if not tokenizer.chat_template:
            return prompt_stream(text, tokenizer)[0]
        text = [{"role": "user", "content": text}]
    stream, _ = chat_stream(text, tokenizer)
    return stream


def _measure(
    rig: Rig, pair: dict[str, Any], methods: Sequence[Method], max_new_tokens: int, repeats: int
) -> dict[str, Any]:
    donor, target = encode(rig, pair["donor"]), encode(rig, pair["target"])
    longest = rig.max_len - max_new_tokens
    if max(len(donor), len(target)) > longest:
        raise InvalidRequestError(f"longer than {longest} tokens", "target")
    ns = rig.namespace(f"bench-{pair['id']}")
    stored = rig.capture(donor, ns, rig.serve(donor, ns, METHODS["full"]).result)
    times: dict[str, list[float]] = {m.name: [] for m in methods}
    served: dict[str, Served] = {}
    answers: dict[str, list[int]] = {}
    for repeat in range(repeats):
        for method in methods:
            one = rig.serve(target, ns, method)
            times[method.name].append(one.ttft)
            if repeat == 0:
                served[method.name] = one
                answers[method.name] = rig.decode(target, one.result.logits, max_new_tokens)
    if stored:
        rig.donors.delete(stored)
    full = served["full"].result.logits
    return {
        "id": pair["id"],
        "tokens": len(target),
        "methods": {
            m.name: {
                "ttft_s": statistics.median(times[m.name]),
                "computed_tokens": served[m.name].result.plan.num_computed,
                "declined": served[m.name].result.plan.declined,
                "kl_first_token": kl_divergence(full, served[m.name].result.logits),
                "first_token_same": bool(full.argmax() == served[m.name].result.logits.argmax()),
                "greedy_agreement": _agreement(answers["full"], answers[m.name]),
                **_quality(rig, answers[m.name], pair.get("reference")),
            }
            for m in methods
        },
    }


def _agreement(full: list[int], other: list[int]) -> float:
    """Length of the common beginning of two greedy answers over the full answer's length."""
    same = 0
    for a, b in zip(full, other, strict=False):
        if a != b:
            break
        same += 1
    return same / len(full)


def _quality(rig: Rig, answer: list[int], reference: str | None) -> dict[str, float]:
    if reference is None:
        return {}
    import sacrebleu
    from rouge_score import rouge_scorer

    text = rig.loaded.tokenizer.decode(answer, skip_special_tokens=True)
    rouge = rouge_scorer.RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    return {"rouge_l": rouge, "bleu": sacrebleu.sentence_bleu(text, [reference]).score}


def _summary(name: str, per_pair: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [p["methods"][name] for p in per_pair]
    ttft = spread([r["ttft_s"] for r in rows])
    full = [p["methods"]["full"]["ttft_s"] for p in per_pair]
    tokens = sum(p["tokens"] for p in per_pair)
    quality = {
        key: statistics.mean(r[key] for r in rows if key in r)
        for key in ("rouge_l", "bleu")
        if any(key in r for r in rows)
    }
    return {
        "ttft_s": {"median": ttft["p50"], "p90": ttft["p90"]},
        "speedup_vs_full": statistics.median(
            f / r["ttft_s"] for f, r in zip(full, rows, strict=True)
        ),
        "computed_share": sum(r["computed_tokens"] for r in rows) / tokens,
        "kl_first_token": spread([r["kl_first_token"] for r in rows]),
        "first_token_agreement": statistics.mean(r["first_token_same"] for r in rows),
        "greedy_agreement": statistics.mean(r["greedy_agreement"] for r in rows),
        "declined": sum(r["declined"] is not None for r in rows),
        "rouge_l": quality.get("rouge_l"),
        "bleu": quality.get("bleu"),
    }
