"""Captions of product photos, for training an image-text pair of encoders."""

from __future__ import annotations

import random

from kvshare_mm.assets.shop.phrases import NUMBERS
from kvshare_mm.assets.shop.pictures import Photo

_SHORT = (
    "a photo of a {colour} {kind}",
    "a {colour} {kind}",
    "this {kind} is {colour}",
    "product photo: {kind}, {colour}",
)
_WITH_BUTTONS = (
    "{short} with {buttons}",
    "{short}, it has {buttons}",
)
_STATES = {True: ("cracked", "damaged"), False: ("intact", "undamaged")}


def caption(photo: Photo) -> str:
    """The full caption in fixed words: kind, colour, buttons and state."""
    state = _STATES[photo.cracked][0]
    return f"a photo of a {photo.colour} {photo.kind} with {_buttons(photo)}, {state}"


def random_caption(photo: Photo, rng: random.Random) -> str:
    """A true caption of chance; buttons and state are not always told."""
    text = rng.choice(_SHORT).format(colour=photo.colour, kind=photo.kind)
    if rng.random() < 0.8:
        text = rng.choice(_WITH_BUTTONS).format(short=text, buttons=_buttons(photo))
    if rng.random() < 0.8:
        text += f", {rng.choice(_STATES[photo.cracked])}"
    return text


def short_caption(kind: str, colour: str) -> str:
    """Kind and colour alone: the classes of a zero-shot test."""
    return _SHORT[0].format(kind=kind, colour=colour)


def _buttons(photo: Photo) -> str:
    return f"{NUMBERS[photo.buttons]} button{'s' if photo.buttons > 1 else ''}"
