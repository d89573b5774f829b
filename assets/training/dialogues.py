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

from kvshare_mm.assets.training.pictures import KINDS, Photo, draw

STORES = (
    "Northwind",
    "Bluebird",
    "Harbor",
    "Maple",
    "Sunrise",
    "Quartz",
    "Pioneer",
    "Lakeside",
    "Cobalt",
    "Ember",
)
NAMES = (
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
    "Rosa",
    "Simon",
    "Tara",
    "Viktor",
)
CITIES = (
    "Oslo",
    "Paris",
    "Milan",
    "Porto",
    "Vienna",
    "Dublin",
    "Prague",
    "Lyon",
    "Turin",
    "Bergen",
)
FILLERS = (
    "Answer politely and in one short sentence.",
    "We answer every letter within one working day.",
    "Look at the photo before you answer.",
    "Customers may send a photo of the box as well.",
    "Promise nothing that is not written here.",
    "Stay calm when a customer is angry.",
    "Payments by card are handled by our bank.",
    "Close the box well before you send it.",
    "Small marks from normal use are no reason for a refund.",
    "Our shops are closed on Sunday.",
    "Gift cards can be used in every shop.",
    "Keep the data of one customer from another.",
    "Parts for older products can be ordered.",
    "These terms are for orders from this year.",
    "Every parcel is insured against loss.",
    "A receipt is needed for each claim.",
    "We repair products in our own workshop.",
    "Good light makes photos easier to read.",
    "Our newsletter comes once a month.",
    "Ask for help if you are not sure.",
    "Large orders are packed by two people.",
    "The shop was founded by two sisters.",
    "Thank the customer for writing to us.",
    "Batteries are never part of a parcel.",
)
NUMBERS = ("no", "one", "two", "three", "four")

PICTURE_TOPICS = ("kind", "colour", "buttons", "crack", "code")
TEXT_TOPICS = ("order", "name", "warranty", "days", "city")
BOTH_TOPICS = ("my_warranty", "my_fee")  # need the photo and the policy
POLICY_TOPICS = ("warranty", "days", "city", *BOTH_TOPICS)
TOPICS = PICTURE_TOPICS + TEXT_TOPICS + BOTH_TOPICS

_HEADS = (
    "You are the assistant of the {store} store.",
    "You work for {store} and help its customers.",
    "You answer the customers of {store}.",
    "This is the service desk of {store}.",
)
_DAYS = (
    "Products can be returned within {days} days.",
    "Customers may return a product for {days} days after delivery.",
    "The return period is {days} days.",
)
_FEES = (
    "Sending back a cracked product costs {cracked} euro, an intact product {intact} euro.",
    "The return fee is {cracked} euro for cracked products and {intact} euro for intact products.",
)
_CITY = (
    "Our warehouse is in {city}.",
    "All parcels go to the warehouse in {city}.",
)
_WARRANTY_STYLES = 3
_INTROS = (
    "Hello, my name is {name} and my order number is {order}.",
    "Hi, I am {name}. Order number {order}.",
    "My order number is {order}. My name is {name}.",
    "This is {name}, my order number is {order}.",
)
# {it} becomes "the product in the second photo" when there are two photos.
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "kind": (
        "What is shown {here}?",
        "Which product do you see {here}?",
        "What kind of product is {here}?",
        "Tell me what is {here}.",
    ),
    "colour": (
        "What colour is {it}?",
        "Which colour does {it} have?",
        "Tell me the colour of {it}.",
        "In which colour is {it}?",
    ),
    "buttons": (
        "How many buttons does {it} have?",
        "Count the buttons of {it}.",
        "How many buttons are on {it}?",
        "Tell me the number of buttons of {it}.",
    ),
    "crack": (
        "Is {it} damaged?",
        "Is {it} cracked?",
        "Do you see a crack on {it}?",
        "Is there any damage to {it}?",
    ),
    "code": (
        "Which code is on the label {here}?",
        "What number is printed on the label {here}?",
        "Read the label {here}.",
        "Tell me the code on the label {here}.",
    ),
    "order": (
        "What is my order number?",
        "Please repeat my order number.",
        "Which order number did I give you?",
        "Tell me my order number.",
    ),
    "name": (
        "What is my name?",
        "Do you know my name?",
        "Who am I?",
        "Tell me my name.",
    ),
    "warranty": (
        "How long is the warranty for a {kind}?",
        "What warranty does a {kind} have?",
        "For how many months is a {kind} covered?",
        "Tell me the warranty of a {kind}.",
    ),
    "days": (
        "How many days do I have for a return?",
        "How long can I return a product?",
        "Until when can I send something back?",
        "Tell me the return period.",
    ),
    "city": (
        "Where is your warehouse?",
        "Where do I send the parcel?",
        "In which city is your warehouse?",
        "Tell me where parcels go.",
    ),
    "my_warranty": (
        "How long is the warranty for {it}?",
        "What warranty does {it} have?",
        "For how many months is {it} covered?",
        "Tell me the warranty of {it}.",
    ),
    "my_fee": (
        "What does it cost to send {it} back?",
        "How much is the return of {it}?",
        "What do I pay to return {it}?",
        "Tell me the return fee for {it}.",
    ),
}
PHRASINGS = 4
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
        head = _HEADS[w.head].format(store=desk.store)
        if not self.policy:
            return head
        sentences = [
            _warranty_text(w.warranty, [(KINDS[k], desk.warranty[k]) for k in w.kinds], w.lines),
            _DAYS[w.days].format(days=desk.days),
            _FEES[w.fee].format(cracked=desk.fee_cracked, intact=desk.fee_intact),
            _CITY[w.city].format(city=desk.city),
        ]
        ordered = [sentences[part] for part in w.parts]
        for filler, place in w.fillers:
            ordered.insert(place, FILLERS[filler])
        return head + ("\n" if w.lines else " ") + ("\n" if w.lines else " ").join(ordered)

    def greeting(self) -> str:
        customer = self.customer
        return _INTROS[self.wording.intro].format(name=customer.name, order=customer.order)

    def question_text(self) -> str:
        q = self.question
        it, here = "this product", "in the photo"
        if len(self.photos) > 1:
            here = f"in the {_ORDINALS[q.photo]} photo"
            it = f"the product {here}"
        return _QUESTIONS[q.topic][q.phrasing].format(it=it, here=here, kind=q.kind)

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
        head=rng.randrange(len(_HEADS)),
        warranty=rng.randrange(_WARRANTY_STYLES),
        days=rng.randrange(len(_DAYS)),
        fee=rng.randrange(len(_FEES)),
        city=rng.randrange(len(_CITY)),
        intro=rng.randrange(len(_INTROS)),
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
