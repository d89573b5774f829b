"""Held-out requests, and requests that are similar to them in one stated way."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from kvshare_mm.assets.shop.dialogues import (
    Request,
    random_customer,
    random_desk,
    random_fillers,
    random_question,
    random_wording,
)
from kvshare_mm.assets.shop.phrases import NAMES, PHRASINGS, PICTURE_TOPICS, TOPICS
from kvshare_mm.assets.shop.pictures import random_photo

WAYS = ("rephrased", "other_filler", "other_facts", "other_picture")
# As customers come, about pictures that are known.
TRAFFIC_WAYS = ("other_question", "other_name")


def random_request(
    rng: random.Random,
    topic: str,
    *,
    num_photos: int = 1,
    num_fillers: int | None = None,
    held_out: bool = True,
    unseen: bool = False,
) -> Request:
    """A request of chance about one topic.

    Args:
        rng: source of chance.
        topic: one of ``TOPICS``.
        num_photos: 0 to 2; topics about a photo need at least one.
        num_fillers: sentences without facts in the policy; 0 to 8 of chance when None.
        held_out: draw photos that were never trained on.
        unseen: photos only of (kind, colour) pairs that were never trained on.
    """
    fillers = rng.randint(0, 8) if num_fillers is None else num_fillers
    return Request(
        desk=random_desk(rng),
        customer=random_customer(rng),
        photos=tuple(
            random_photo(rng, held_out=held_out, unseen=unseen) for _ in range(num_photos)
        ),
        question=random_question(rng, topic, num_photos),
        wording=random_wording(rng, fillers),
    )


def held_out_requests(
    seed: int, topics: Sequence[str] = TOPICS, *, num_photos: int = 1, unseen: bool = False
) -> Iterator[Request]:
    """Endless held-out requests, the topics in turn; equal seeds give equal requests."""
    rng = random.Random(f"held out {seed} {num_photos} {unseen}")
    while True:
        for topic in topics:
            yield random_request(rng, topic, num_photos=num_photos, unseen=unseen)


def held_out_items(
    seed: int, topics: Sequence[str] = TOPICS, *, num_photos: int = 1
) -> Iterator[tuple[list[dict[str, Any]], str, dict[str, Any]]]:
    """Endless (messages with PIL images, right answer, facts) of held-out requests."""
    for request in held_out_requests(seed, topics, num_photos=num_photos):
        yield request.messages(), request.answer(), request.facts()


def similar(request: Request, way: str, rng: random.Random) -> Request:
    """A request that differs from the given one in one way.

    ``rephrased``: the same question in other words, the same answer. ``other_filler``: other
    sentences without facts in the policy, the same answer. ``other_facts``: another policy and
    customer in the same words; answers that depend on them change. ``other_picture``: photos of
    other products; answers that depend on them change. ``other_question``: about another topic.
    ``other_name``: another customer's, all else the same.

    Raises:
        ValueError: unknown way, or no photo to change.
    """
    question, wording = request.question, request.wording
    if way == "rephrased":
        other = (question.phrasing + rng.randrange(1, PHRASINGS)) % PHRASINGS
        return replace(request, question=replace(question, phrasing=other))
    if way == "other_filler":
        while True:
            fillers = random_fillers(rng, max(2, len(wording.fillers)))
            if fillers != wording.fillers:
                return replace(request, wording=replace(wording, fillers=fillers))
    if way == "other_facts":
        while True:
            changed = replace(request, desk=random_desk(rng), customer=random_customer(rng))
            if changed.answer() != request.answer() or (
                question.topic in PICTURE_TOPICS and changed != request
            ):
                return changed
    if way == "other_picture":
        if not request.photos:
            raise ValueError("a request without photos has no picture to change")
        while True:
            photos = tuple(random_photo(rng, held_out=True) for _ in request.photos)
            changed = replace(request, photos=photos)
            if changed.answer() != request.answer() or (
                not question.needs_photo and changed != request
            ):
                return changed
    if way == "other_question":
        topic = rng.choice([each for each in TOPICS if each != question.topic])
        return replace(request, question=random_question(rng, topic, len(request.photos)))
    if way == "other_name":
        name = rng.choice([each for each in NAMES if each != request.customer.name])
        return replace(request, customer=replace(request.customer, name=name))
    raise ValueError(f"unknown way {way!r}; known are {', '.join(WAYS + TRAFFIC_WAYS)}")


def similar_pairs(
    seed: int, ways: Sequence[str] = WAYS, topics: Sequence[str] = TOPICS, *, num_photos: int = 1
) -> Iterator[tuple[str, Request, Request]]:
    """Endless (way, donor, target) of held-out requests, ways and topics in turn."""
    rng = random.Random(f"similar {seed}")
    for index, donor in enumerate(held_out_requests(seed, topics, num_photos=num_photos)):
        way = ways[(index // len(topics)) % len(ways)]
        yield way, donor, similar(donor, way, rng)
