"""Product photos, drawn: six kinds, eight colours, 1-4 buttons, a crack or none, a printed code.

A picture is a pure function of its :class:`Photo`: attributes are what questions ask about, the
seed decides everything else (place, size, background, lettering, noise).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 112  # pixels a side: 8x8 patches of 14, 4x4 merged patches ("cells")
CELL = 28

KINDS = ("phone", "radio", "camera", "kettle", "lamp", "clock")
COLOURS = {
    "red": (206, 38, 40),
    "green": (42, 150, 62),
    "blue": (44, 84, 204),
    "yellow": (240, 214, 44),
    "purple": (132, 58, 172),
    "orange": (242, 128, 24),
    "black": (36, 36, 40),
    "pink": (248, 152, 190),
}
MAX_BUTTONS = 4

# Never drawn for training: whether kind and colour are understood apart shows on these.
UNSEEN_PAIRS = frozenset(
    {
        ("phone", "red"),
        ("radio", "blue"),
        ("camera", "green"),
        ("kettle", "purple"),
        ("lamp", "black"),
        ("clock", "yellow"),
    }
)
HELD_OUT_SEED = 1 << 40  # training uses photo seeds below, evaluation from here on

_Box = tuple[float, float, float, float]
_BACKGROUNDS = (
    (236, 236, 230),
    (214, 224, 236),
    (226, 216, 202),
    (202, 208, 204),
    (246, 246, 246),
    (184, 194, 204),
)


@dataclass(frozen=True, slots=True)
class Photo:
    """What is on a photo. Equal photos are equal pixels.

    Attributes:
        kind: one of :data:`KINDS`.
        colour: one of :data:`COLOURS`.
        buttons: 1 to :data:`MAX_BUTTONS`.
        cracked: whether a crack runs over the product.
        code: two digits on the label.
        seed: decides all that no question asks about.
    """

    kind: str
    colour: str
    buttons: int
    cracked: bool
    code: str
    seed: int


@dataclass(slots=True)
class Marks:
    """Where on the picture (x, y in pixels) the asked-about things are; labels for training."""

    digits: list[tuple[float, float]] = field(default_factory=list)
    buttons: list[tuple[float, float]] = field(default_factory=list)
    crack: list[tuple[float, float]] = field(default_factory=list)


def random_photo(rng: random.Random, *, held_out: bool = False, unseen: bool = False) -> Photo:
    """A photo of chance.

    Args:
        rng: source of chance.
        held_out: take the seed from the range that is never trained on.
        unseen: only the pairs of kind and colour that are never trained on; else only the others.
    """
    while True:
        kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
        if ((kind, colour) in UNSEEN_PAIRS) == unseen:
            break
    return Photo(
        kind=kind,
        colour=colour,
        buttons=rng.randint(1, MAX_BUTTONS),
        cracked=rng.random() < 0.5,
        code=f"{rng.randrange(100):02d}",
        seed=rng.randrange(1 << 32) + (HELD_OUT_SEED if held_out else 0),
    )


def draw(photo: Photo, marks: Marks | None = None) -> Image.Image:
    """The photo as an RGB image of :data:`SIZE` pixels a side; ``marks`` is filled when given."""
    rng = random.Random(photo.seed)
    image = Image.new("RGB", (SIZE, SIZE), _shade(rng.choice(_BACKGROUNDS), rng, 8))
    pen = ImageDraw.Draw(image)
    _backdrop(pen, rng)
    label_above = rng.random() < 0.5
    product = _Product(
        pen,
        x=rng.uniform(44, 68),
        y=rng.uniform(66, 74) if label_above else rng.uniform(38, 46),
        scale=rng.uniform(0.88, 1.06),
        fill=_shade(COLOURS[photo.colour], rng, 10),
    )
    face = _BODIES[photo.kind](product)
    marks = Marks() if marks is None else marks
    if photo.cracked:
        marks.crack = product.crack(face, rng)
    marks.buttons = product.buttons(face, photo.buttons, rng)
    marks.digits = _label(pen, photo.code, label_above, rng)
    return _camera(image, rng)


class _Product:
    """A pen that draws around the product's centre, in the product's scale and colour."""

    def __init__(
        self, pen: ImageDraw.ImageDraw, x: float, y: float, scale: float, fill: tuple[int, ...]
    ) -> None:
        self.pen, self.x, self.y, self.scale, self.fill = pen, x, y, scale, fill
        self.dark = tuple(int(value * 0.6) for value in fill)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + x * self.scale, self.y + y * self.scale

    def box(self, x0: float, y0: float, x1: float, y1: float) -> _Box:
        return (*self.at(x0, y0), *self.at(x1, y1))

    def crack(self, face: _Box, rng: random.Random) -> list[tuple[float, float]]:
        x0, y0, x1, y1 = face
        steps = 6
        level = rng.uniform(y0 + 8, y1 - 8)
        points = []
        for step in range(steps + 1):
            swing = rng.uniform(3, 8) * (-1) ** step
            points.append(self.at(x0 - 3 + (x1 - x0 + 6) * step / steps, level + swing))
        self.pen.line(points, fill=(255, 255, 255), width=4)
        self.pen.line(points, fill=(8, 8, 8), width=2)
        return points

    def buttons(self, face: _Box, count: int, rng: random.Random) -> list[tuple[float, float]]:
        x0, y0, x1, y1 = face
        spots: list[tuple[float, float]] = []
        gap, tries = 13.0, 0
        while len(spots) < count:
            spot = (rng.uniform(x0 + 4, x1 - 4), rng.uniform(y0 + 4, y1 - 4))
            if all((spot[0] - x) ** 2 + (spot[1] - y) ** 2 > gap**2 for x, y in spots):
                spots.append(spot)
            tries += 1
            if tries % 60 == 0:  # an unlucky start leaves no room for the rest
                spots, gap = [], gap * 0.97
        for x, y in spots:
            self.pen.ellipse(
                self.box(x - 4.6, y - 4.6, x + 4.6, y + 4.6),
                fill=(252, 252, 252),
                outline=(16, 16, 16),
                width=1,
            )
        return [self.at(x, y) for x, y in spots]


# Each draws a body and returns the face: the box in which buttons and crack are.


def _phone(p: _Product) -> _Box:
    p.pen.rounded_rectangle(p.box(-18, -34, 18, 34), radius=6, fill=p.fill, outline=p.dark, width=2)
    p.pen.line([p.at(-6, -29), p.at(6, -29)], fill=p.dark, width=2)
    return -14, -25, 14, 29


def _radio(p: _Product) -> _Box:
    p.pen.line([p.at(18, -16), p.at(34, -36)], fill=p.dark, width=3)
    p.pen.rounded_rectangle(p.box(-36, -18, 36, 26), radius=5, fill=p.fill, outline=p.dark, width=3)
    return -31, -13, 31, 21


def _camera_body(p: _Product) -> _Box:
    p.pen.rectangle(p.box(-2, -30, 26, -18), fill=p.dark)
    p.pen.rectangle(p.box(-35, -20, 35, 26), fill=p.fill, outline=p.dark, width=2)
    p.pen.ellipse(p.box(3, -13, 33, 17), fill=p.dark, outline=(210, 210, 214), width=2)
    return -32, -16, 2, 22


def _kettle(p: _Product) -> _Box:
    p.pen.arc(p.box(-18, -40, 18, -8), 180, 360, fill=p.dark, width=4)
    p.pen.polygon([p.at(-22, -2), p.at(-40, -18), p.at(-34, -22), p.at(-18, -12)], fill=p.dark)
    p.pen.polygon(
        [p.at(-20, -22), p.at(20, -22), p.at(31, 30), p.at(-31, 30)], fill=p.fill, outline=p.dark
    )
    return -19, -16, 19, 26


def _lamp(p: _Product) -> _Box:
    p.pen.rectangle(p.box(-3, 4, 3, 28), fill=p.dark)
    p.pen.ellipse(p.box(-20, 24, 20, 34), fill=p.dark)
    p.pen.polygon(
        [p.at(-19, -34), p.at(19, -34), p.at(36, 8), p.at(-36, 8)], fill=p.fill, outline=p.dark
    )
    return -19, -29, 19, 5


def _clock(p: _Product) -> _Box:
    for side in (-1, 1):
        p.pen.ellipse(p.box(side * 22 - 9, -38, side * 22 + 9, -20), fill=p.dark)
        p.pen.line([p.at(side * 18, 22), p.at(side * 26, 35)], fill=p.dark, width=4)
    p.pen.ellipse(p.box(-31, -31, 31, 31), fill=p.fill, outline=p.dark, width=4)
    return -20, -20, 20, 20


_BODIES: dict[str, Callable[[_Product], _Box]] = {
    "phone": _phone,
    "radio": _radio,
    "camera": _camera_body,
    "kettle": _kettle,
    "lamp": _lamp,
    "clock": _clock,
}


def _shade(colour: tuple[int, ...], rng: random.Random, spread: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)


def _backdrop(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    if rng.random() < 0.4:
        edge = rng.randint(60, 96)
        pen.rectangle((0, edge, SIZE, SIZE), fill=_shade((192, 172, 146), rng, 8))
    if rng.random() < 0.3:
        for _ in range(3):
            x = rng.randint(0, SIZE)
            pen.line((x, 0, x + rng.randint(-15, 15), SIZE), fill=_shade((206, 212, 216), rng, 6))


def _label(
    pen: ImageDraw.ImageDraw, code: str, above: bool, rng: random.Random
) -> list[tuple[float, float]]:
    font = ImageFont.load_default(rng.randint(23, 28))
    x, y = rng.uniform(6, 70), (rng.uniform(2, 5) if above else rng.uniform(80, 84))
    x0, y0, x1, y1 = pen.textbbox((x, y), code, font=font, anchor="lt")
    pen.rectangle((x0 - 4, y0 - 3, x1 + 4, y1 + 3), fill=(252, 252, 252), outline=(90, 90, 90))
    pen.text((x, y), code, font=font, fill=_shade((18, 18, 18), rng, 10), anchor="lt")
    first = pen.textlength(code[0], font=font)
    middle = (y0 + y1) / 2
    return [(x + first / 2, middle), ((x + first + x1) / 2, middle)]


def _camera(image: Image.Image, rng: random.Random) -> Image.Image:
    """Sensor noise and exposure."""
    noise = np.random.default_rng(rng.getrandbits(32))
    strength, exposure = rng.choice((0.0, 2.0, 5.0)), rng.uniform(0.9, 1.06)
    pixels = np.asarray(image, dtype=np.float32) * exposure
    if strength:
        pixels = pixels + strength * noise.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
