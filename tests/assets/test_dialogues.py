"""Dialogues and drawings: answers follow the facts, similar requests differ in one way."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.assets.shop.dialogues import Question, Request
from kvshare_mm.assets.shop.phrases import (
    PHRASINGS,
    PICTURE_TOPICS,
    POLICY_TOPICS,
    TEXT_TOPICS,
    TOPICS,
)
from kvshare_mm.assets.shop.pictures import (
    HELD_OUT_SEED,
    KINDS,
    SIZE,
    UNSEEN_PAIRS,
    Marks,
    Photo,
    draw,
    random_photo,
)
from kvshare_mm.assets.shop.similar import (
    TRAFFIC_WAYS,
    WAYS,
    held_out_items,
    held_out_requests,
    random_request,
    similar,
    similar_pairs,
)


def request_of(seed: int, topic: str, num_photos: int = 1) -> Request:
    return random_request(random.Random(seed), topic, num_photos=num_photos)


@given(st.integers(0, 10_000), st.sampled_from(TOPICS), st.integers(1, 2))
def test_what_an_answer_says_stands_in_the_facts(seed: int, topic: str, num_photos: int) -> None:
    request = request_of(seed, topic, num_photos)
    facts, answer = request.facts(), request.answer()
    photo = facts["photos"][request.question.photo]
    expected = {
        "kind": photo["kind"],
        "colour": photo["colour"],
        "buttons": ("one", "two", "three", "four")[photo["buttons"] - 1],
        "crack": "cracked" if photo["cracked"] else "intact",
        "code": photo["code"],
        "order": facts["order"],
        "name": facts["name"],
        "warranty": str(facts["warranty"][request.question.kind]),
        "days": str(facts["days"]),
        "city": facts["city"],
        "my_warranty": str(facts["warranty"][photo["kind"]]),
        "my_fee": str(facts["fee_cracked"] if photo["cracked"] else facts["fee_intact"]),
    }[topic]
    assert expected in answer


@given(st.integers(0, 10_000), st.sampled_from(TOPICS))
def test_the_policy_and_the_greeting_say_what_answers_need(seed: int, topic: str) -> None:
    request = request_of(seed, topic)
    text = request.system_text() + request.greeting()
    desk, customer = request.desk, request.customer
    for fact in (desk.days, desk.city, desk.store, customer.name, customer.order, *desk.warranty):
        assert str(fact) in text
    bare = replace(request, policy=False).system_text()
    assert desk.city not in bare and "warranty" not in bare.lower()


@pytest.mark.parametrize("topic", TOPICS)
def test_every_phrasing_is_another_question(topic: str) -> None:
    for num_photos in (1, 2):
        request = request_of(1, topic, num_photos)
        asked = {
            replace(request, question=Question(topic, phrasing)).question_text()
            for phrasing in range(PHRASINGS)
        }
        assert len(asked) == PHRASINGS


def test_two_photos_are_told_apart_by_the_question() -> None:
    request = request_of(2, "colour", 2)
    first = replace(request, question=Question("colour", photo=0))
    second = replace(request, question=Question("colour", photo=1))
    assert "first photo" in first.question_text() and "second photo" in second.question_text()
    assert request.photos[0].colour in first.answer()
    assert request.photos[1].colour in second.answer()


@given(
    st.integers(0, 10_000),
    st.sampled_from(TOPICS),
    st.sampled_from(WAYS + TRAFFIC_WAYS),
    st.integers(1, 2),
)
def test_similar_requests_differ_in_the_stated_way_only(
    seed: int, topic: str, way: str, num_photos: int
) -> None:
    donor = request_of(seed, topic, num_photos)
    target = similar(donor, way, random.Random(seed))
    same = {
        "rephrased": replace(target, question=donor.question),
        "other_filler": replace(
            target, wording=replace(target.wording, fillers=donor.wording.fillers)
        ),
        "other_facts": replace(target, desk=donor.desk, customer=donor.customer),
        "other_picture": replace(target, photos=donor.photos),
        "other_question": replace(target, question=donor.question),
        "other_name": replace(target, customer=donor.customer),
    }[way]
    assert target != donor and same == donor
    changed = target.answer() != donor.answer()
    if way in ("rephrased", "other_filler"):
        assert not changed
    elif way == "other_facts":
        assert changed == (topic not in PICTURE_TOPICS)
    elif way == "other_picture":
        assert changed == (topic not in TEXT_TOPICS)
    elif way == "other_question":
        assert target.question.topic != topic
    else:
        assert changed == (topic == "name")


def test_a_way_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown way"):
        similar(request_of(3, "kind"), "louder", random.Random(0))
    with pytest.raises(ValueError, match="no picture"):
        similar(request_of(3, "name", 0), "other_picture", random.Random(0))


def test_generators_repeat_themselves_and_cover_all() -> None:
    once = list(itertools.islice(held_out_requests(5), 24))
    assert once == list(itertools.islice(held_out_requests(5), 24))
    assert once != list(itertools.islice(held_out_requests(6), 24))
    assert {request.question.topic for request in once} == set(TOPICS)
    pairs = list(itertools.islice(similar_pairs(5), len(WAYS) * len(TOPICS)))
    assert {(way, donor.question.topic) for way, donor, _ in pairs} == set(
        itertools.product(WAYS, TOPICS)
    )


def test_items_are_messages_with_pictures() -> None:
    messages, answer, facts = next(held_out_items(1, ["my_fee"], num_photos=2))
    parts = messages[1]["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    assert [image.size for image in images] == [(SIZE, SIZE)] * 2
    assert answer.endswith("euro.") and len(facts["photos"]) == 2
    assert set(POLICY_TOPICS) <= set(TOPICS)


@given(st.integers(0, 10_000), st.booleans())
def test_training_never_draws_what_is_held_out(seed: int, held_out: bool) -> None:
    rng = random.Random(seed)
    photo = random_photo(rng, held_out=held_out)
    assert (photo.kind, photo.colour) not in UNSEEN_PAIRS
    assert (photo.seed >= HELD_OUT_SEED) == held_out
    unseen = random_photo(rng, unseen=True)
    assert (unseen.kind, unseen.colour) in UNSEEN_PAIRS


@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_a_drawing_shows_what_it_is_of(seed: int, kind: str) -> None:
    photo = replace(random_photo(random.Random(seed)), kind=kind)
    marks = Marks()
    pixels = np.asarray(draw(photo, marks))
    assert pixels.shape == (SIZE, SIZE, 3)
    assert len(marks.buttons) == photo.buttons and len(marks.digits) == 2
    assert bool(marks.crack) == photo.cracked
    for x, y in (*marks.buttons, *marks.digits, *marks.crack):
        assert 0 <= x < SIZE and 0 <= y < SIZE
    for x, y in marks.buttons:  # white discs that nothing covers
        assert pixels[round(y), round(x)].min() > 190
    np.testing.assert_array_equal(pixels, np.asarray(draw(photo)))


def test_photos_that_differ_in_one_attribute_differ_where_it_shows() -> None:
    photo = Photo("radio", "red", 2, False, "17", seed=9)
    plain = np.asarray(draw(photo)).astype(int)
    cracked = np.asarray(draw(replace(photo, cracked=True))).astype(int)
    renumbered = np.asarray(draw(replace(photo, code="18"))).astype(int)
    assert np.abs(plain - cracked).max() > 100
    assert np.abs(plain - renumbered).max() > 100
