"""Requests to the customer-service desk of a small shop, with their only right answers.

A :class:`Request` is a frozen value: what the policy says (:class:`Desk`), who writes
(:class:`Customer`), which photos, which question, and how everything is worded (:class:`Wording`).
Similar requests are ``dataclasses.replace`` of one another: see :mod:`.similar`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kvshare_mm.assets.shop.phrases import (
    BOTH_TOPICS,
    CITIES,
    CITY,
    DAYS,
    FEES,
    FILLERS,
    HEADS,
    INTROS,
    NAMES,
    NUMBERS,
    PHRASINGS,
    PICTURE_TOPICS,
    POLICY_TOPICS,
    QUESTIONS,
    STORES,
    WARRANTY_STYLES,
)
from kvshare_mm.assets.shop.pictures import KINDS, Photo, draw

_ORDINALS = ("first", "second")


@dataclass(frozen=True, slots=True)
class Desk:
    """What a shop's policy says: warranty in months by kind, fees in euro."""

    store: str
    city: str
    days: int
    fee_cracked: int
    fee_intact: int
    warranty: tuple[int, ...]  # one per kind of KINDS


@dataclass(frozen=True, slots=True)
class Customer:
    """Who writes; the order number is a string of 4 to 6 digits."""

    name: str
    order: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        topic: one of :data:`TOPICS`.
        phrasing: which wording of the question, 0 to :data:`PHRASINGS` - 1.
        photo: index of the photo that is asked about.
        kind: the kind of product a ``warranty`` question names.
    """

    topic: str
    phrasing: int = 0
    photo: int = 0
    kind: str = KINDS[0]

    @property
    def needs_photo(self) -> bool:
        return self.topic in PICTURE_TOPICS + BOTH_TOPICS

    @property
    def needs_policy(self) -> bool:
        return self.topic in POLICY_TOPICS


@dataclass(frozen=True, slots=True)
class Wording:
    """How a request is put; none of it changes the answer.

    Attributes:
        head, warranty, days, fee, city, intro: which wording of each sentence.
        parts: order of the four policy sentences.
        kinds: order in which the warranty names the kinds.
        fillers: (index into :data:`FILLERS`, place among the sentences) of each filler.
        lines: one policy sentence a line.
        photos_first: photos stand before the customer's words, else between greeting and question.
    """

    head: int
    warranty: int
    days: int
    fee: int
    city: int
    intro: int
    parts: tuple[int, ...]
    kinds: tuple[int, ...]
    fillers: tuple[tuple[int, int], ...]
    lines: bool
    photos_first: bool


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the desk, with everything that its answer depends on.

    ``policy=False`` leaves the policy's sentences out: then nobody can answer its questions.
    """

    desk: Desk
    customer: Customer
    photos: tuple[Photo, ...]
    question: Question
    wording: Wording
    policy: bool = True

    def system_text(self) -> str:
        w, desk = self.wording, self.desk
        head = HEADS[w.head].format(store=desk.store)
        if not self.policy:
            return head
        sentences = [
            _warranty_text(w.warranty, [(KINDS[k], desk.warranty[k]) for k in w.kinds], w.lines),
            DAYS[w.days].format(days=desk.days),
            FEES[w.fee].format(cracked=desk.fee_cracked, intact=desk.fee_intact),
            CITY[w.city].format(city=desk.city),
        ]
        ordered = [sentences[part] for part in w.parts]
        for filler, place in w.fillers:
            ordered.insert(place, FILLERS[filler])
        return head + ("\n" if w.lines else " ") + ("\n" if w.lines else " ").join(ordered)

    def greeting(self) -> str:
        customer = self.customer
        return INTROS[self.wording.intro].format(name=customer.name, order=customer.order)

    def question_text(self) -> str:
        q = self.question
        it, here = "this product", "in the photo"
        if len(self.photos) > 1:
            here = f"in the {_ORDINALS[q.photo]} photo"
            it = f"the product {here}"
        return QUESTIONS[q.topic][q.phrasing].format(it=it, here=here, kind=q.kind)

    def user_parts(self) -> list[str | Photo]:
        """The user's message in order; the last part is text and ends with the question."""
        if self.wording.photos_first:
            return [*self.photos, f"{self.greeting()} {self.question_text()}"]
        return [self.greeting() + " ", *self.photos, self.question_text()]

    def answer(self) -> str:
        """The one right answer."""
        q, desk = self.question, self.desk
        if q.topic == "order":
            return f"Your order number is {self.customer.order}."
        if q.topic == "name":
            return f"Your name is {self.customer.name}."
        if q.topic == "warranty":
            return f"The warranty for a {q.kind} is {desk.warranty[KINDS.index(q.kind)]} months."
        if q.topic == "days":
            return f"You have {desk.days} days."
        if q.topic == "city":
            return f"The warehouse is in {desk.city}."
        return self._answer_about(self.photos[q.photo])

    def _answer_about(self, photo: Photo) -> str:
        topic, desk, kind = self.question.topic, self.desk, photo.kind
        if topic == "kind":
            return f"It is a {kind}."
        if topic == "colour":
            return f"It is {photo.colour}."
        if topic == "buttons":
            return f"It has {NUMBERS[photo.buttons]} button{'s' if photo.buttons > 1 else ''}."
        if topic == "crack":
            return "Yes, it is cracked." if photo.cracked else "No, it is intact."
        if topic == "code":
            return f"The label says {photo.code}."
        if topic == "my_warranty":
            return f"The warranty for a {kind} is {desk.warranty[KINDS.index(kind)]} months."
        if topic == "my_fee":
            if photo.cracked:
                return f"It is cracked, so it costs {desk.fee_cracked} euro."
            return f"It is intact, so it costs {desk.fee_intact} euro."
        raise ValueError(f"unknown topic {topic!r}")

    def messages(self, images: list[Any] | None = None) -> list[dict[str, Any]]:
        """The request as chat messages.

        Args:
            images: what stands for the photos (PIL images, paths, URLs); drawn when None.
        """
        pictures = iter(self.pictures() if images is None else images)
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": next(pictures)}
            for part in self.user_parts()
        ]
        return [
            {"role": "system", "content": [{"type": "text", "text": self.system_text()}]},
            {"role": "user", "content": content},
        ]

    def pictures(self) -> list[Image.Image]:
        return [draw(photo) for photo in self.photos]

    def facts(self) -> dict[str, Any]:
        """All that is true of this request, in plain values."""
        desk = self.desk
        return {
            "topic": self.question.topic,
            "about_photo": self.question.photo if self.question.needs_photo else None,
            "order": self.customer.order,
            "name": self.customer.name,
            "store": desk.store,
            "city": desk.city,
            "days": desk.days,
            "fee_cracked": desk.fee_cracked,
            "fee_intact": desk.fee_intact,
            "warranty": dict(zip(KINDS, desk.warranty, strict=True)),
            "photos": [
                {
                    "kind": photo.kind,
                    "colour": photo.colour,
                    "buttons": photo.buttons,
                    "cracked": photo.cracked,
                    "code": photo.code,
                }
                for photo in self.photos
            ],
        }


def random_desk(rng: random.Random) -> Desk:
    cracked, intact = rng.sample(range(2, 60), 2)
    return Desk(
        store=rng.choice(STORES),
        city=rng.choice(CITIES),
        days=rng.randint(5, 90),
        fee_cracked=cracked,
        fee_intact=intact,
        warranty=tuple(rng.randint(2, 60) for _ in KINDS),
    )


def random_customer(rng: random.Random) -> Customer:
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 6)))
    return Customer(name=rng.choice(NAMES), order=digits)


def random_question(rng: random.Random, topic: str, num_photos: int) -> Question:
    return Question(
        topic=topic,
        phrasing=rng.randrange(PHRASINGS),
        photo=rng.randrange(num_photos) if num_photos else 0,
        kind=rng.choice(KINDS),
    )


def random_wording(rng: random.Random, num_fillers: int) -> Wording:
    return Wording(
        head=rng.randrange(len(HEADS)),
        warranty=rng.randrange(WARRANTY_STYLES),
        days=rng.randrange(len(DAYS)),
        fee=rng.randrange(len(FEES)),
        city=rng.randrange(len(CITY)),
        intro=rng.randrange(len(INTROS)),
        parts=tuple(rng.sample(range(4), 4)),
        kinds=tuple(rng.sample(range(len(KINDS)), len(KINDS))),
        fillers=random_fillers(rng, num_fillers),
        lines=rng.random() < 0.5,
        photos_first=rng.random() < 0.7,
    )


def random_fillers(rng: random.Random, count: int) -> tuple[tuple[int, int], ...]:
    chosen = rng.sample(range(len(FILLERS)), count)
    return tuple((filler, rng.randint(0, 4 + i)) for i, filler in enumerate(chosen))


def _warranty_text(style: int, months: list[tuple[str, int]], lines: bool) -> str:
    if style == 0:
        return "Warranty: " + ", ".join(f"{kind} {n} months" for kind, n in months) + "."
    if style == 1:
        return " ".join(f"The warranty for a {kind} is {n} months." for kind, n in months)
    joint = "\n- " if lines else "; "
    return (
        "Warranty by kind:"
        + ("\n- " if lines else " ")
        + joint.join(f"{kind}: {n} months" for kind, n in months)
        + ("" if lines else ".")
    )
