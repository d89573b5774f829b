"""Everyday cases of prompts that are alike but not equal, for the demo and the tests.

Three are of words. Two are of pictures, for models that were trained on the drawings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Story:
    """Somebody asked `donor`; now somebody else asks `target`: a question, or messages."""

    name: str
    about: str
    donor: str | Messages
    target: str | Messages

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
    "Grade this geography exam. Give one point for every correct answer.\n"
    "Key: 1 Paris, 2 Nile, 3 Pacific Ocean, 4 Everest, 5 Canberra, 6 Sahara, 7 Tokyo, "
    "8 Brazil, 9 Danube, 10 Iceland.\n"
)
_EXAM_QUESTIONS = (
    "What is the capital of France?",
    "Which river flows through Cairo?",
    "Which is the largest ocean on Earth?",
    "Which is the highest mountain above sea level?",
    "What is the capital of Australia?",
    "Which is the largest hot desert?",
    "What is the capital of Japan?",
    "Which country is the largest in South America?",
    "Which river flows through Vienna and Budapest?",
    "Which island country has Reykjavik as its capital?",
)
_EXAM_TASK = "Write down the student's answer to question 7."
_RIGHT = ("Paris", "Nile", "Pacific Ocean", "Everest", "Canberra", "Sahara", "Tokyo", "Brazil",
          "Danube", "Iceland")  # fmt: skip


def exam(student: str, changed: dict[int, str], question: str) -> str:
    """A ten-question exam; `changed` gives the answers that are not the right ones."""
    rows = "\n".join(
        f"Question {i}: {text} Student's answer: {changed.get(i, right)}."
        for i, (text, right) in enumerate(zip(_EXAM_QUESTIONS, _RIGHT, strict=True), 1)
    )
    return f"{_EXAM_HEAD}Student number {student}.\n{rows}\n{question}"


_POLICY = (
    "Answer the customer with the shop's rules.\n"
    "Rules of the shop. Goods can be returned within 30 days of delivery if they are unused and in "
    "their box. Refunds are paid to the card that was used within 5 working days. A return costs "
    "4 euros, and nothing if the goods arrived damaged. Damaged goods must be reported within 14 "
    "days with a photo. The warranty is 24 months for machines and 12 months for accessories. "
    "Orders above 50 euros are delivered free of charge, others cost 6 euros. Delivery takes 2 to "
    "4 working days. An order can be changed until it has left the warehouse. Gift cards are valid "
    "for 3 years and cannot be paid out. Repairs take about 10 working days.\n"
)


def support(customer: str, product: str) -> str:
    """A customer's question in front of the shop's rules."""
    return f"Customer, about a {product}: {customer}\n{_POLICY}Write one short answer."


STORIES = (
    Story(
        "lab report",
        "the same blood report with another patient's numbers",
        lab_report(_DONOR_VALUES, "48210", "Question: What is the haemoglobin value?"),
        lab_report(_TARGET_VALUES, "77345", "Question: What is the haemoglobin value?"),
    ),
    Story(
        "exam",
        "the same exam with another student's answers",
        exam("1041", {4: "K2"}, _EXAM_TASK),
        exam(
            "2216",
            {3: "Atlantic Ocean", 7: "Kyoto"},
            _EXAM_TASK,
        ),
    ),
    Story(
        "support question",
        "the same rules, the question put in other words",
        support("How many days do I have to send it back if I do not like it?", "coffee machine"),
        support("Until when can I return it? I have not used it yet.", "toaster"),
    ),
)


def picture_stories() -> tuple[Story, ...]:
    """Two requests about drawn product photos, and who asked before."""
    from kvshare_mm.assets.shop.dialogues import random_customer
    from kvshare_mm.assets.shop.similar import random_request, similar

    rng = random.Random("stories")
    photo = random_request(rng, "my_warranty", num_fillers=4)
    photo = replace(photo, wording=replace(photo.wording, photos_first=False))
    asked_again = replace(similar(photo, "rephrased", rng), customer=random_customer(rng))
    policy = random_request(rng, "my_fee", num_fillers=4)
    return (
        Story(
            "same photo",
            "another customer sends the same photo and asks in other words",
            photo.messages(),
            asked_again.messages(),
        ),
        Story(
            "other photo",
            "the same rules and the same question about another photo",
            policy.messages(),
            similar(policy, "other_picture", rng).messages(),
        ),
    )


def random_values(rng: random.Random) -> list[str]:
    """Sixteen values around those of the story, as another patient's report has them."""
    return [_vary(value, rng) for value in _DONOR_VALUES]


def _vary(value: str, rng: random.Random) -> str:
    decimals = len(value.partition(".")[2])
    return f"{float(value) * rng.uniform(0.7, 1.3):.{decimals}f}"
