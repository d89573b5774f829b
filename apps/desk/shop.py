"""What customers of the demo's shop send, and how the desk puts it to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvshare_mm.errors import InvalidRequestError

MAX_NAME, MAX_ORDER, MAX_QUESTION = 40, 20, 1000  # characters

_RULES = (
    "You work at the service desk of the Harbor store and know its rules. Goods can be returned "
    "within 30 days of delivery. A return costs 4 euros. Damaged goods must be reported within 14 "
    "days. The money comes back to the card within 5 working days. The warranty is 24 months for "
    "kettles, 12 months for lamps and 36 months for cameras. Delivery takes 3 working days and "
    "costs 6 euros. Gift cards are valid for 3 years. Repairs take 10 working days. The store is "
    "open from 9 to 18 and closed on Sunday. The warehouse is in Vienna.\n"
)
# In the words that the embedded model which sees was trained on.
_POLICY = (
    "You are the assistant of the Harbor store. "
    "Products can be returned within 30 days. "
    "Sending back a cracked product costs 9 euro, an intact product 4 euro. "
    "The warranty for a phone is 24 months. The warranty for a radio is 12 months. "
    "The warranty for a camera is 36 months. The warranty for a kettle is 18 months. "
    "The warranty for a lamp is 6 months. The warranty for a clock is 48 months. "
    "Our warehouse is in Vienna. Answer politely and in one short sentence. "
    "Promise nothing that is not written here. Thank the customer for writing to us."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A letter as the page sends it: with tokens of uploads in the place of files."""

    name: str
    order: str
    question: str
    photo: str | None = None
    voice: str | None = None


@dataclass(frozen=True, slots=True)
class Letter:
    """What one customer sends.

    Attributes:
        name: of the customer.
        order: order number.
        question: in the customer's words.
        photo: an image file's bytes, or None.
        voice: a sound file's bytes, or None.

    Raises:
        InvalidRequestError: name, order number or question is too long.
    """

    name: str
    order: str
    question: str
    photo: bytes | None = None
    voice: bytes | None = None

    def __post_init__(self) -> None:
        for field, most in (("name", MAX_NAME), ("order", MAX_ORDER), ("question", MAX_QUESTION)):
            if len(getattr(self, field)) > most:
                raise InvalidRequestError(f"the {field} has more than {most} characters", field)

    def messages(self) -> list[dict[str, Any]]:
        """The letter as a chat: who writes comes first, as in a ticket, the rules behind it.

        That is where prefix caching ends: the customers differ in the first line.
        """
        if self.photo is None and self.voice is None:
            head = f"This is a letter of {self.name} with order number {self.order}.\n"
            tail = f"{self.question} Answer in one short sentence."
            return [{"role": "user", "content": head + _RULES + tail}]
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": f"Hi, I am {self.name}. Order number {self.order}. "}
        ]
        if self.photo is not None:
            parts.append({"type": "image", "image": self.photo})
        if self.voice is not None:
            parts.append({"type": "audio", "audio": self.voice})
        if self.question:
            parts.append({"type": "text", "text": self.question})
        return [{"role": "system", "content": _POLICY}, {"role": "user", "content": parts}]


@dataclass(frozen=True, slots=True)
class Example:
    """A prepared question.

    Attributes:
        label: of its button.
        question: what is asked.
        photo: name of a file in ``pictures/``, or None.
    """

    label: str
    question: str
    photo: str | None = None


# Both have as many: they share the page's buttons.
TEXT_EXAMPLES = (
    Example("Delivery", "How long does the delivery take?"),
    Example("My order number", "What is my order number?"),
    Example("Warranty", "How long is the warranty of a kettle?"),
    Example("Warehouse", "Where is the warehouse?"),
)
PHOTO_EXAMPLES = (
    Example("Is it damaged?", "Is this product damaged?", "kettle.png"),
    Example("Which colour?", "What colour is this product?", "kettle.png"),
    Example("Its warranty", "How long is the warranty for this product?", "kettle.png"),
    Example("Another photo", "Is this product damaged?", "kettle-intact.png"),
)
CUSTOMERS = (("Anna", "48210"), ("Boris", "77345"))
