"""`kvshare bench pictures`: right answers about pictures, with reuse and without.

Requests come in pairs that differ in one way: the question's words, sentences in the policy without
facts, its facts, or the picture. The first of a pair is stored; the second is answered by every
method and compared with the right answer. The leak test takes pairs that differ in the picture
alone: an answer that is right for the stored picture, where full recompute is right for the new
one, has looked at the wrong picture.

Traffic is what customers do with a picture that is known: they ask something else about it, or
another customer asks, whose name stands before it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.progress import track

from kvshare_mm.apps.bench.methods import METHODS, Method, with_full
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.assets.shop.dialogues import Request
from kvshare_mm.assets.shop.phrases import BOTH_TOPICS, PICTURE_TOPICS, TOPICS
from kvshare_mm.assets.shop.similar import TRAFFIC_WAYS, WAYS, similar_pairs

_MAX_TOKENS = 24
Pair = tuple[str, Request, Request]


def run(
    rig: Rig,
    methods: Sequence[Method],
    *,
    num_pairs: int = 640,
    num_leak_pairs: int = 300,
    num_traffic_pairs: int = 320,
    num_photos: int = 1,
    seed: int = 1,
) -> dict[str, Any]:
    """Measure every method.

    Args:
        rig: a model that was trained on these requests, with a slot for each method.
        methods: beside full recompute.
        num_pairs: similar requests, as many of each way.
        num_leak_pairs: of which the picture alone differs, and the right answer with it.
        num_traffic_pairs: with a picture that is known, as many of each way.
        num_photos: pictures of a request.
        seed: of the requests; all are held out of training.
    """
    methods = with_full(methods)
    similar = similar_pairs(seed, num_photos=num_photos)
    answered = list(_answered(rig, similar, num_pairs, methods))
    leaked = list(_answered(rig, _other_pictures(seed + 1, num_photos), num_leak_pairs, methods))
    known = list(_answered(rig, _known_pictures(seed + 2, num_photos), num_traffic_pairs, methods))
    return {
        "kind": "pictures",
        "model": rig.loaded.name,
        "dtype": str(rig.loaded.dtype).removeprefix("torch."),
        "repair": rig.config.repair,
        "photos": num_photos,
        "pairs": len(answered),
        "methods": {m.name: accuracy(m.name, answered) for m in methods},
        "leaks": {m.name: leaks(m.name, leaked) for m in methods},
        "traffic": {way: traffic([p for p in known if p["way"] == way]) for way in TRAFFIC_WAYS},
        "per_pair": answered,
        "per_leak_pair": leaked,
        "per_traffic_pair": known,
    }


def _other_pictures(seed: int, num_photos: int) -> Iterator[Pair]:
    topics = PICTURE_TOPICS + BOTH_TOPICS
    pairs = similar_pairs(seed, ("other_picture",), topics, num_photos=num_photos)
    for way, donor, target in pairs:
        if donor.answer() != target.answer():
            yield way, donor, target


def _known_pictures(seed: int, num_photos: int) -> Iterator[Pair]:
    """The customer's name stands before the pictures, the question behind them."""
    for way, donor, target in similar_pairs(seed, TRAFFIC_WAYS, num_photos=num_photos):
        wording = replace(donor.wording, photos_first=False)
        yield way, replace(donor, wording=wording), replace(target, wording=wording)


def _answered(
    rig: Rig, pairs: Iterator[Pair], count: int, methods: Sequence[Method]
) -> Iterator[dict[str, Any]]:
    for number, (way, donor, target) in enumerate(
        track(itertools.islice(pairs, count), "Asking about pictures", count, transient=True)
    ):
        ns = rig.namespace(f"pictures-{number}")
        asked = encode(rig, target.messages())
        with rig.known(encode(rig, donor.messages()), ns, METHODS["prefix"]):
            # What one method's encoder made must not be another's: nothing is kept.
            served = [
                rig.serve(asked, ns, method, slot, store=False)
                for slot, method in enumerate(methods)
            ]
        answers = rig.decode(served, _MAX_TOKENS)
        yield {
            "way": way,
            "topic": target.question.topic,
            "tokens": len(asked),
            "right": target.answer(),
            "donors": donor.answer(),
            "methods": {
                method.name: {
                    "answer": rig.words(answer).strip(),
                    "computed_tokens": one.result.plan.num_computed,
                    "ttft_s": one.ttft,
                    "pictures": [use.source for use in one.result.media],
                }
                for method, one, answer in zip(methods, served, answers, strict=True)
            },
        }


def accuracy(name: str, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """How often a method is right, by kind of pair and of question, and what it computes."""

    def share(some: list[dict[str, Any]]) -> float | None:
        right = [p["methods"][name]["answer"] == p["right"] for p in some]
        return sum(right) / len(right) if right else None

    ways: dict[str, float | None] = {w: share([p for p in pairs if p["way"] == w]) for w in WAYS}
    topics = {t: share([p for p in pairs if p["topic"] == t]) for t in TOPICS}
    computed = sum(p["methods"][name]["computed_tokens"] for p in pairs)
    uses = [use for p in pairs for use in p["methods"][name]["pictures"]]
    return {
        "accuracy": share(pairs),
        "accuracy_by_way": ways,
        "accuracy_by_topic": topics,
        "same_as_full": sum(
            p["methods"][name]["answer"] == p["methods"]["full"]["answer"] for p in pairs
        )
        / max(1, len(pairs)),
        "computed_share": computed / max(1, sum(p["tokens"] for p in pairs)),
        "encoder_share": uses.count("encoder") / max(1, len(uses)),
    }


def traffic(pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What prefix caching and KVShare compute of one way's pairs, and which is sooner."""
    if not pairs:
        return None
    asked = [pair["methods"] for pair in pairs]
    tokens = sum(pair["tokens"] for pair in pairs)
    return {
        "pairs": len(pairs),
        "computed_share": {
            name: sum(each[name]["computed_tokens"] for each in asked) / tokens
            for name in ("prefix", "kvshare")
        },
        "speedup_vs_prefix": statistics.median(
            each["prefix"]["ttft_s"] / each["kvshare"]["ttft_s"] for each in asked
        ),
        "same_as_full": sum(a["kvshare"]["answer"] == a["full"]["answer"] for a in asked)
        / len(asked),
    }


def leaks(name: str, pairs: list[dict[str, Any]]) -> dict[str, int]:
    """How often a method answers for the stored picture where full recompute knows better."""
    followed = [p for p in pairs if p["methods"][name]["answer"] == p["donors"]]
    return {
        "pairs": len(pairs),
        "right": sum(p["methods"][name]["answer"] == p["right"] for p in pairs),
        "follow_the_donor": len(followed),
        "leaks": sum(p["methods"]["full"]["answer"] == p["right"] for p in followed),
    }
