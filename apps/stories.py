"""Everyday cases of prompts that are alike but not equal, for the demo and the tests.

Those of words ask what a small model can answer. Two are of pictures, for models that were trained
on the drawings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Story:
    """Somebody asked `donor`; now somebody else asks `target`: a question, or messages.

    Attributes:
        right: what a right answer to `target` says.
        before: what the right answer to `donor` says, if that is another.
    """

    name: str
    about: str
    donor: str | Messages
    target: str | Messages
    right: str
    before: str = ""

    @staticmethod
    def messages(asked: str | Messages) -> Messages:
        """As the model is asked it."""
        return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


_ANALYTES = (
    ("Haemoglobin", "g/L", "130-170"),
    ("White cells", "10^9/L", "4.0-10.0"),
    ("Platelets", "10^9/L", "150-400"),
    ("Sodium", "mmol/L", "135-145"),
    ("Potassium", "mmol/L", "3.5-5.1"),
    ("Chloride", "mmol/L", "98-107"),
    ("Creatinine", "umol/L", "60-110"),
    ("Urea", "mmol/L", "2.5-7.8"),
    ("Glucose", "mmol/L", "3.9-5.6"),
    ("Calcium", "mmol/L", "2.20-2.60"),
    ("Albumin", "g/L", "35-50"),
    ("Bilirubin", "umol/L", "3-21"),
    ("ALT", "U/L", "10-50"),
    ("Ferritin", "ug/L", "30-400"),
    ("TSH", "mIU/L", "0.4-4.0"),
    ("CRP", "mg/L", "0-5"),
)
_DONOR_VALUES = [
    "148",
    "6.1",
    "231",
    "141",
    "4.2",
    "103",
    "84",
    "5.3",
    "5.1",
    "2.41",
    "43",
    "12",
    "31",
    "118",
    "1.9",
    "2",
]
_TARGET_VALUES = [
    "121",
    "6.1",
    "231",
    "141",
    "4.2",
    "103",
    "84",
    "5.3",
    "7.9",
    "2.41",
    "43",
    "12",
    "31",
    "118",
    "1.9",
    "2",
]


def lab_report(values: list[str], patient: str, question: str) -> str:
    """A blood report of sixteen values with a question about it."""
    rows = "\n".join(
        f"- {name}: {value} {unit} (reference range {normal})"
        for (name, unit, normal), value in zip(_ANALYTES, values, strict=True)
    )
    return (
        f"Laboratory report. Patient number {patient}. Sample: venous blood, fasting.\n"
        f"{rows}\n"
        "All values were measured on the day of collection and checked by a second person. "
        "The sample was free of haemolysis.\n"
        f"{question}"
    )


_EXAM_HEAD = (
    "Grade this geography exam. Every correct answer gives one point. Spelling does not matter, a "
    "missing answer gives none, and a wrong one takes nothing away. Key: Paris, Nile, Pacific "
    "Ocean, Everest, Canberra, Sahara, Tokyo, Brazil, Danube, Iceland.\n"
)
_EXAM = (
    ("Capital of France", "Paris"),
    ("River that flows through Cairo", "Nile"),
    ("Largest ocean", "Pacific Ocean"),
    ("Highest mountain", "Everest"),
    ("Capital of Australia", "Canberra"),
    ("Largest hot desert", "Sahara"),
    ("Capital of Japan", "Tokyo"),
    ("Largest country of South America", "Brazil"),
    ("River that flows through Vienna", "Danube"),
    ("Island whose capital is Reykjavik", "Iceland"),
)
_EXAM_TASK = "Question: What is the largest ocean, says the student?"


def exam(student: str, changed: dict[str, str]) -> str:
    """A geography exam; `changed` gives the answers that are not the right ones."""
    rows = "\n".join(f"- {asked}: {changed.get(right, right)}" for asked, right in _EXAM)
    return (
        f"{_EXAM_HEAD}Student number {student} answered:\n{rows}\n"
        f"All answers were read by two teachers. Spelling does not matter.\n{_EXAM_TASK}"
    )


_POLICY = (
    "Rules of the shop. Goods can be returned within 30 days of delivery if they are unused and in "
    "their box. Refunds are paid to the card that was used within 5 working days. A return costs "
    "4 euros, and nothing if the goods arrived damaged. Damaged goods must be reported within 14 "
    "days with a photo. The warranty is 24 months for machines and 12 months for accessories. "
    "Orders above 50 euros are delivered free of charge, others cost 6 euros. Delivery takes 2 to "
    "4 working days. An order can be changed until it has left the warehouse. Gift cards are valid "
    "for 3 years and cannot be paid out. Repairs take about 10 working days.\n"
)


def support(customer: str, question: str) -> str:
    """A customer's name in front of the shop's rules, and a question behind them."""
    return f"Customer: {customer}.\n{_POLICY}Question: {question}"


_HANDBOOK = """\
You answer the customers of a bicycle shop, by its rules.
Repairs. Flat tyres are mended while customers wait, for 15 euros. Brakes are adjusted within two \
days, for 40 euros. Gears are set within three days, for 35 euros. A wheel is trued for 25 euros, \
and a new chain costs 30 euros with the work. Electric bicycles are not repaired here: name the \
workshop at the station. Never promise a date for spare parts.
Rental. Children's bicycles can be rented by the week, helmets included, against a deposit of 80 \
euros. City bicycles cost 12 euros a day. Whoever returns a bicycle late pays for one more day. \
Rented bicycles are insured against theft if the lock was used.
Sales. New bicycles have a warranty of five years on the frame and two years on all other parts. \
Used bicycles are bought on Saturdays only, with the receipt of the first owner. A first \
inspection is free within three months of the purchase. Locks, lights and pumps can be returned \
within 30 days if they were not used.
Hours. The shop is open from Tuesday to Saturday, from 9 to 18 o'clock. The workshop closes one \
hour earlier. In December the shop is open on Mondays too.
Be polite, and answer in one short sentence."""


def clocked(clock: str, order: str, product: str) -> Messages:
    """A system prompt that begins with the time of day, and a customer's order."""
    asked = f"My order has the number {order}. What did the {product} cost?"
    return [
        {"role": "system", "content": f"It is {clock}. {_HANDBOOK}"},
        {"role": "user", "content": asked},
    ]


_TURNS = (
    "Good morning. My bicycle has been standing in the rain all winter, and now it makes noises "
    "everywhere. I would like to ride it to work from Monday on.",
    "Good morning. Bring it to our workshop, and we will look at it together before you leave it "
    "with us.",
    "Can I come without an appointment, and when is the workshop open?",
    "Yes, you can. The workshop is open from Tuesday to Saturday, from 9 to 17 o'clock, and in "
    "December on Mondays too.",
    "I live in Bergen Street, number 7, and I cannot carry it that far. Do you collect bicycles at "
    "home?",
    "I am sorry, we do not collect bicycles, but the tram to our door takes bicycles outside of "
    "the rush hours.",
    "All right, I will take the tram. It is a green city bicycle with seven gears, about ten years "
    "old. Is it worth the repair?",
    "Most city bicycles of that age are worth it, as long as the frame has no cracks and is not "
    "bent.",
    "The frame is fine, I looked at it from all sides. But I heard that there are no parts any "
    "more for the old gears.",
    "We keep parts for most gears of the last twenty years, and what we do not have can be ordered "
    "from the maker.",
    "How long would that take? I have no other bicycle, and the bus is full every morning.",
    "We never promise a date for parts, but you can rent a city bicycle for 12 euros a day in the "
    "meantime.",
    "Good to know. The chain is rusty, and it jumps when I ride uphill.",
    "A new chain costs 30 euros with the work, and we check the teeth of the wheels for free.",
    "And the front wheel wobbles since I rode over a kerb.",
    "A wheel is trued for 25 euros.",
)


def conversation(first: int, end: int, question: str) -> Messages:
    """What was said of turns ``first`` to `end`, customer and shop in turn, and a question."""
    said = [
        {"role": "assistant" if i % 2 else "user", "content": text}
        for i, text in enumerate(_TURNS[first:end])
    ]
    return [
        {"role": "system", "content": _HANDBOOK},
        *said,
        {"role": "user", "content": question},
    ]


STORIES = (
    Story(
        "clock",
        "a minute later, another customer",
        clocked("10:42:07", "4471: one lamp for 32 euros, sent on Monday", "lamp"),
        clocked("10:43:51", "9032: one helmet for 58 euros, sent on Friday", "helmet"),
        right="58 euros",
        before="32",
    ),
    Story(
        "lab report",
        "another patient",
        lab_report(_DONOR_VALUES, "48210", "Question: What is the haemoglobin value?"),
        lab_report(_TARGET_VALUES, "77345", "Question: What is the haemoglobin value?"),
        right="121",
        before="148",
    ),
    Story(
        "exam",
        "another student",
        exam("1041", {"Everest": "K2"}),
        exam("2216", {"Pacific Ocean": "Atlantic Ocean", "Sahara": "Gobi"}),
        right="Atlantic",
        before="Pacific",
    ),
    Story(
        "support",
        "another customer and question",
        support("Ada Lund, order 4471", "What does a return cost?"),
        support("Tom Berg, order 9032", "How long do repairs take?"),
        right="10 working days",
        before="4 euros",
    ),
    Story(
        "dropped turn",
        "a chat without its oldest turn",
        conversation(0, 14, "How much is the new chain?"),
        conversation(2, 16, "How much is the wheel?"),
        right="25 euros",
        before="30",
    ),
)


def picture_stories() -> tuple[Story, ...]:
    """Two requests about drawn product photos, and who asked before.

    The time of day stands in front of the rules, and the photos behind them.
    """
    from kvshare_mm.assets.shop.dialogues import Request, random_customer
    from kvshare_mm.assets.shop.phrases import FILLERS
    from kvshare_mm.assets.shop.similar import random_request, similar

    def at(clock: str, request: Request) -> Messages:
        system, user = request.messages()
        rules = {"type": "text", "text": f"It is {clock}. {request.system_text()}"}
        return [{**system, "content": [rules]}, user]

    rng = random.Random("stories")
    both = random_request(rng, "my_warranty", num_photos=2, num_fillers=len(FILLERS))
    both = replace(both, wording=replace(both.wording, photos_first=False))
    second = replace(both.question, photo=1 - both.question.photo)
    asked_again = replace(both, question=second, customer=random_customer(rng))
    policy = random_request(rng, "my_fee", num_fillers=len(FILLERS))
    other = similar(policy, "other_picture", rng)
    return (
        Story(
            "same photos",
            "a minute later, about the other one",
            at("10:42:07", both),
            at("10:43:51", asked_again),
            right=asked_again.answer(),
            before=both.answer(),
        ),
        Story(
            "other photo",
            "a minute later, the same question",
            at("10:42:07", policy),
            at("10:43:51", other),
            right=other.answer(),
            before=policy.answer(),
        ),
    )


def random_values(rng: random.Random) -> list[str]:
    """Sixteen values around those of the story, as another patient's report has them."""
    return [_vary(value, rng) for value in _DONOR_VALUES]


def _vary(value: str, rng: random.Random) -> str:
    decimals = len(value.partition(".")[2])
    return f"{float(value) * rng.uniform(0.7, 1.3):.{decimals}f}"
