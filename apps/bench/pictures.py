"""`kvshare bench pictures`: right answers about pictures, with reuse and without.

Requests come in pairs that differ in one way: the question's words, sentences in the policy without
facts, its facts, or the picture. The first of a pair is stored; the second is answered by every
method and compared with the right answer. The leak test takes pairs that differ in the picture
alone: an answer that is right for the stored picture, where full recompute is right for the new
one, has looked at the wrong picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from kvshare_mm.apps.bench.methods import METHODS, Method
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.reuse import with_full
from kvshare_mm.apps.bench.rig import Rig, Served, machine
from kvshare_mm.assets.shop.dialogues import Request
from kvshare_mm.assets.shop.phrases import BOTH_TOPICS, PICTURE_TOPICS, TOPICS
from kvshare_mm.assets.shop.similar import WAYS, similar_pairs
from kvshare_mm.stream import SegmentStream

_MAX_TOKENS = 24
Pair = tuple[str, Request, Request]


def run(
    rig: Rig,
    methods: Sequence[Method],
    *,
    num_pairs: int = 640,
    num_leak_pairs: int = 300,
    num_photos: int = 1,
    seed: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure every method.

    Args:
        rig: a model that was trained on these requests, with a slot for each method.
        methods: beside full recompute.
        num_pairs: similar requests, as many of each way.
        num_leak_pairs: of which the picture alone differs, and the right answer with it.
        num_photos: pictures of a request.
        seed: of the requests; all are held out of training.
    """
    methods = with_full(methods)
    pairs = itertools.islice(similar_pairs(seed, num_photos=num_photos), num_pairs)
    answered = list(_answered(rig, pairs, num_pairs, methods, progress))
    leaks = itertools.islice(_other_pictures(seed + 1, num_photos), num_leak_pairs)
    leaked = list(_answered(rig, leaks, num_leak_pairs, methods, progress))
    return {
        "kind": "pictures",
        "machine": machine(),
        "model": rig.loaded.name,
        "dtype": str(rig.loaded.dtype).removeprefix("torch."),
        "repair": rig.config.repair,
        "photos": num_photos,
        "pairs": len(answered),
        "methods": {m.name: _accuracy(m.name, answered) for m in methods},
        "leaks": {m.name: _leaks(m.name, leaked) for m in methods},
        "per_pair": answered,
        "per_leak_pair": leaked,
    }


def _other_pictures(seed: int, num_photos: int) -> Iterator[Pair]:
    topics = PICTURE_TOPICS + BOTH_TOPICS
    pairs = similar_pairs(seed, ("other_picture",), topics, num_photos=num_photos)
    for way, donor, target in pairs:
        if donor.answer() != target.answer():
            yield way, donor, target


def _answered(
    rig: Rig, pairs: Iterator[Pair], total: int, methods: Sequence[Method], progress: bool
) -> Iterator[dict[str, Any]]:
    for number, (way, donor, target) in enumerate(
        tqdm(pairs, total=total, desc="Asking", unit="pair", disable=not progress)
    ):
        ns = rig.namespace(f"pictures-{number}")
        stream = encode(rig, donor.messages())
        stored = rig.capture(stream, ns, rig.serve(stream, ns, METHODS["prefix"]))
        asked = encode(rig, target.messages())
        served = [_served(rig, asked, ns, method, slot) for slot, method in enumerate(methods)]
        answers = rig.decode(served, _MAX_TOKENS)
        if stored is not None:
            rig.donors.delete(stored)
        texts = [rig.loaded.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
        yield {
            "way": way,
            "topic": target.question.topic,
            "tokens": len(asked),
            "right": target.answer(),
            "donors": donor.answer(),
            "methods": {
                method.name: {
                    "answer": text.strip(),
                    "computed_tokens": one.result.plan.num_computed,
                    "pictures": [use.source for use in one.result.media],
                }
                for method, one, text in zip(methods, served, texts, strict=True)
            },
        }


def _served(rig: Rig, asked: SegmentStream, ns: str, method: Method, slot: int) -> Served:
    # What one method's encoder made must not be another's: nothing is kept.
    result = rig.prefiller.prefill(
        slot, asked, ns, sharing=method.sharing, policy=method.policy, store=False
    )
    return Served(slot, result, 0.0, 0.0)


def _accuracy(name: str, pairs: list[dict[str, Any]]) -> dict[str, Any]:
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


def _leaks(name: str, pairs: list[dict[str, Any]]) -> dict[str, int]:
    followed = [p for p in pairs if p["methods"][name]["answer"] == p["donors"]]
    return {
        "pairs": len(pairs),
        "right": sum(p["methods"][name]["answer"] == p["right"] for p in pairs),
        "follow_the_donor": len(followed),
        "leaks": sum(p["methods"]["full"]["answer"] == p["right"] for p in followed),
    }
